"""Compiles every Triton kernel to machine code for the sm_* given, no GPU needed: run by test_triton_compiles.py.

Each launch is replaced by a compilation for its arguments' types; the results of the launchers are garbage.
"""

import sys
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1",
}
ARCHITECTURE = int(sys.argv[1])
compiled = set()


def type_of(value):
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def is_one(value):
    return type(value) is int and value == 1


def check_grid(kernel, *arguments, grid, **named):
    assert all(programs <= 65535 for programs in grid[1:]), f"{kernel.__module__}.{kernel.__name__}: {grid}"


def compile_instead(kernel, *arguments, grid, warmup, **named):
    check_grid(kernel, grid=grid)
    values = dict(zip(kernel.arg_names, arguments)) | named
    # As on a launch: an integer argument of 1 is made a constant, which has fewer methods than a number of the kernel.
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr or is_one(values[p.name])}
    signature = {name: "constexpr" if name in constants else type_of(values[name]) for name in kernel.arg_names}
    places = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
    options = {"num_warps": named["num_warps"]} if "num_warps" in named else {}
    key = f"{kernel.__module__}.{kernel.__name__} {signature} {constants} {options}"
    if key in compiled:
        return
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=places)
    code = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=options)
    assert len(code.asm["cubin"]) > 0
    if "BANK" in constants:
        from spss_fast.kernels.contrastive import shared_memory

        assert code.metadata.shared <= shared_memory(constants["BANK"], constants["WIDTH"]), (key, code.metadata.shared)
    compiled.add(key)


def any_prototypes(logits, k):
    return torch.zeros(logits.shape[1], k, dtype=torch.long), torch.full((logits.shape[1],), k)


def launch_contrastive(features, logits, k, both_and_grad):
    from spss_fast.kernels import contrastive

    # The loss's launcher indexes with what the kernel that selects would have found.
    with patch.object(contrastive, "select_prototypes", any_prototypes):
        contrastive.contrastive_loss(
            features, features, features, logits, logits, k, 0.07, both_and_grad, both_and_grad
        )


def launch_all(cases, maps_of, images):
    """Every launcher, on (dtype, (B, *spatial)); what has channels on (dtype, (B, C, *spatial)), warp without dtype."""
    from spss_fast.kernels import activation, contrastive, losses, norm, uncertainty, warp

    for dtype, voxels in cases:
        logits, features = (torch.zeros(voxels[0], c, *voxels[1:], dtype=dtype) for c in (2, 64))
        total = torch.zeros(logits.shape)
        target, mask = torch.zeros(voxels, dtype=torch.long), torch.zeros(voxels, dtype=torch.bool)
        uncertainty.accumulate_softmax(total, logits)
        for on_probabilities in (True, False):
            result, sums = losses.masked_ce_dice(logits, target, mask, on_probabilities)
            losses.masked_ce_dice_backward(result, logits, target, mask, sums, on_probabilities)
        result, sums = losses.weighted_ce_dice(logits, target, mask.float())
        losses.weighted_ce_dice_backward(result, logits, target, mask.float(), sums)
        contrastive.select_prototypes(logits, 50)
        for both_and_grad in (True, False):
            launch_contrastive(features, logits, 50, both_and_grad)
        uncertainty.uncertainty_mask(total, 8 if voxels[0] > 1 else 1, torch.tensor(4))
    for dtype, (batch, channels, *sides) in maps_of:
        maps = torch.zeros(batch, channels, *sides, dtype=dtype)
        maps = maps.contiguous(memory_format=torch.channels_last_3d) if len(sides) == 3 else maps
        wide = torch.zeros(channels, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for skip, mean in ((maps, None), (None, wide)):
            norm.batch_norm_relu(maps, wide, wide, skip, mean, mean, 1e-5)
            norm.batch_norm_relu_backward(maps, maps, wide, wide, wide, wide, 1e-5, mean is None)
            activation.bias_leaky_relu(maps, wide, skip, 0.2)
            activation.bias_leaky_relu_backward(maps, maps, wide, 0.2)
    for batch, channels, *sides in images:
        image, shift = torch.zeros(batch, channels, *sides), torch.zeros(batch, len(sides), *sides)
        for mode, padding in (("bilinear", "zeros"), ("nearest", "border")):
            warp.warp(image, shift, mode, padding)
            warp.warp_backward(image, image, shift, mode, padding, True, mode == "bilinear")


def main():
    JITFunction.run = compile_instead
    # The last is one voxel, so that every number that can be 1 is.
    launch_all(
        [(torch.float32, (2, 6, 6, 6)), (torch.bfloat16, (2, 6, 6, 6)), (torch.float32, (1, 1))],
        [(torch.bfloat16, (2, 16, 6, 6, 6)), (torch.float64, (2, 3, 7)), (torch.float32, (2, 1, 1))],
        [(2, 2, 6, 6, 6), (2, 2, 6, 6), (2, 1, 1, 1, 1)],
    )
    for k, width in ((100, 16), (11, 128)):  # the largest take minutes to compile
        launch_contrastive(torch.zeros(2, width, 6), torch.zeros(2, 2, 6), k, True)
    JITFunction.run = check_grid  # more samples than CUDA has programs along the second axis of a grid
    samples = 2**16
    launch_all([(torch.float32, (samples, 3))], [(torch.float32, (samples, 3, 2))], [(samples, 1, 2, 2)])
    kernels = sorted({key.split()[0] for key in compiled})
    print(*kernels, sep="\n")


if __name__ == "__main__":
    main()
