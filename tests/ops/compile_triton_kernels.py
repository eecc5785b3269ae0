"""Compiles every Triton kernel to machine code for sm_80 and sm_90, no GPU needed: run by test_triton_compiles.py.

Each launch is replaced by a compilation for its arguments' types; the results of the launchers are garbage.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1",
}
ARCHITECTURES = (80, 90)
compiled = set()


def type_of(value):
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def compile_instead(kernel, *arguments, grid, warmup, **named):
    values = dict(zip(kernel.arg_names, arguments)) | named
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    signature = {name: "constexpr" if name in constants else type_of(values[name]) for name in kernel.arg_names}
    places = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
    for architecture in ARCHITECTURES:
        key = f"{kernel.__module__}.{kernel.__name__} {architecture} {signature} {constants}"
        if key in compiled:
            continue
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=places)
        code = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        assert len(code.asm["cubin"]) > 0
        compiled.add(key)


def any_prototypes(logits, k):
    return torch.zeros(logits.shape[1], k, dtype=torch.long), torch.full((logits.shape[1],), k)


def main():
    JITFunction.run = compile_instead
    from spss_fast.kernels import contrastive, losses, uncertainty, warp

    for dtype in (torch.float32, torch.bfloat16):
        logits, features = torch.zeros(2, 2, 6, 6, 6, dtype=dtype), torch.zeros(2, 64, 6, 6, 6, dtype=dtype)
        total = torch.zeros(2, 2, 6, 6, 6)
        target, mask = torch.zeros(2, 6, 6, 6, dtype=torch.long), torch.zeros(2, 6, 6, 6, dtype=torch.bool)
        uncertainty.accumulate_softmax(total, logits)
        for on_probabilities in (True, False):
            result, sums = losses.masked_ce_dice(logits, target, mask, on_probabilities)
            losses.masked_ce_dice_backward(result, logits, target, mask, sums, on_probabilities)
        result, sums = losses.weighted_ce_dice(logits, target, mask.float())
        losses.weighted_ce_dice_backward(result, logits, target, mask.float(), sums)
        contrastive.select_prototypes(logits, 50)
        # What the kernel above would have found; the loss's launcher indexes with it.
        select, contrastive.select_prototypes = contrastive.select_prototypes, any_prototypes
        for both_and_grad in (True, False):
            contrastive.contrastive_loss(
                features, features, features, logits, logits, 50, 0.07, both_and_grad, both_and_grad
            )
        contrastive.select_prototypes = select
    image, shift = torch.zeros(2, 2, 6, 6, 6), torch.zeros(2, 3, 6, 6, 6)
    for mode, padding in (("bilinear", "zeros"), ("nearest", "border")):
        warp.warp(image, shift, mode, padding)
        warp.warp_backward(image, image, shift, mode, padding, True, mode == "bilinear")
    uncertainty.uncertainty_mask(total, 8, torch.tensor(4))
    kernels = sorted({key.split(" {")[0] for key in compiled})
    print(*kernels, sep="\n")


if __name__ == "__main__":
    main()
