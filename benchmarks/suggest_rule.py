"""What the rules of ``spss_fast.suggest`` are worth beside a random choice, on scans that have full labels.

    python benchmarks/suggest_rule.py --run RUN --data-dir SCANS [--seeds 20]

RUN is a folder of a trained run: its registration network carries labels, its settings prepare the scans. Every slice
that holds foreground is tried as the annotated one, so each draw costs a look-up only. Labels serve to measure and to
draw the random slices; the suggestion does not see them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from spss_fast import metrics
from spss_fast.data.cache import PreparedCase, prepare
from spss_fast.data.geometry import Grid, resample
from spss_fast.data.layouts import find_cases
from spss_fast.data.selection import halving_slice
from spss_fast.engine import checkpoint
from spss_fast.engine.device import resolve_amp, resolve_device
from spss_fast.engine.pseudo_labels import registration_labels
from spss_fast.engine.registration import outward_flows
from spss_fast.engine.run_folder import RunFolder
from spss_fast.nets.regnet import RegistrationNet
from spss_fast.settings import Config
from spss_fast.suggest import choose

ATLAS = 24  # voxels a side of the grid on which labels of different scans are compared


@torch.no_grad()
def dice_by_slice(case: PreparedCase, network: torch.nn.Module, config: Config, device: torch.device) -> np.ndarray:
    """(D,) Dice of the registration labels of the whole volume when slice z is the annotated one; NaN where slice z
    holds no foreground."""
    label = np.array(case.label())
    volume = torch.from_numpy(case.image)[None].to(device)
    amp = resolve_amp(config.training.amp, device)
    depth = label.shape[2]
    up, down = (outward_flows(network, volume, torch.tensor([z], device=device), amp) for z in (0, depth - 1))
    dice = np.full(depth, np.nan)
    for z in np.flatnonzero(label.any((0, 1))):
        annotation = torch.from_numpy(label[None, :, :, z].copy())
        where = torch.tensor([z], device=device)
        flows = torch.cat([down[:, :z], up[:, z:]], 1)
        carried = registration_labels(flows, annotation, where, config.data.class_count, config.registration)
        dice[z] = metrics.dice(carried[0].cpu().numpy() > 0, label > 0)
    return dice


def middle_three_fifths(slices: np.ndarray) -> np.ndarray:
    """Of the slices that hold foreground, those that METHOD draws from."""
    margin = slices.size // 5
    return slices[margin : slices.size - margin]


def row(name: str, draws: list[np.ndarray]) -> str:
    """One line of the table: mean over draws and cases, spread over draws, spread over cases, misses.

    ``draws`` holds an array of Dice per case for each seed; a slice without foreground (NaN) counts as Dice 0.
    """
    table = np.stack(draws)
    misses, table = np.isnan(table).mean(), np.nan_to_num(table)
    spread = f"{table.mean(1).std():.3f}" if len(draws) > 1 else "-"
    return f"| {name} | {table.mean():.3f} | {spread} | {table.std(1).mean():.3f} | {100 * misses:.1f}% |"


def slice_table(cases: list[PreparedCase], dice: list[np.ndarray], seeds: int) -> list[str]:
    """The rule for the slice beside draws, as Markdown."""
    foreground = [np.flatnonzero(~np.isnan(row)) for row in dice]

    def drawn(pool: Callable[[int], np.ndarray]) -> list[np.ndarray]:
        generators = [np.random.default_rng(seed) for seed in range(seeds)]
        return [np.array([dice[i][random.choice(pool(i))] for i in range(len(cases))]) for random in generators]

    suggested = np.array([row[halving_slice(case.image)] for case, row in zip(cases, dice)])
    centre = np.array([row[row.size // 2] for row in dice])
    gain = np.nan_to_num(suggested) - np.nan_to_num(centre)
    return [
        "| annotated slice | Dice | sd over seeds | sd over volumes | without foreground |", "|---|---|---|---|---|",
        row("suggested", [suggested]),
        row("middle slice of the scan", [centre]),
        row("random, middle three fifths of the foreground", drawn(lambda i: middle_three_fifths(foreground[i]))),
        row("random, any slice with foreground", drawn(lambda i: foreground[i])),
        row("random, any slice", drawn(lambda i: np.arange(dice[i].size))),
        row("best of all, by the labels", [np.array([np.nanmax(row) for row in dice])]),
        "", f"suggested against middle: {gain.mean():+.4f}, standard error {gain.std() / len(gain) ** 0.5:.4f}",
    ]


def volume_table(cases: list[PreparedCase], dice: list[np.ndarray], budgets: list[int], draws: int) -> list[str]:
    """The rule for the volumes beside draws, as Markdown.

    Likeness: a volume's label compared (Dice) with that of the most alike chosen volume, both stretched to one grid;
    the mean over the volumes that are not chosen. Registration: mean Dice of the chosen volumes' registration labels.
    """
    grid = Grid((ATLAS,) * 3)
    atlas = np.stack([
        resample(np.array(case.label()).astype(np.float32), Grid(case.image.shape),
                 Grid(case.image.shape).resized(grid.size), linear=True).ravel() > 0.5 for case in cases
    ]).astype(np.float64)
    both, sizes = atlas @ atlas.T, atlas.sum(1)
    alike = 2 * both / (sizes[:, None] + sizes)
    own = np.array([np.nan_to_num(row[halving_slice(case.image)]) for case, row in zip(cases, dice)])

    def measured(chosen: list[int]) -> tuple[float, float]:
        others = [i for i in range(len(cases)) if i not in set(chosen)]
        return float(alike[np.ix_(others, chosen)].max(1).mean()), float(own[chosen].mean())

    lines = ["| volumes | likeness: suggested | random | draws below | registration: suggested | random | below |",
             "|---|---|---|---|---|---|---|"]
    for budget in budgets:
        names = [case.name for case in choose(cases, budget)]
        ours = measured([i for i, case in enumerate(cases) if case.name in set(names)])
        random = np.random.default_rng(0)
        others = np.array([measured(list(random.permutation(len(cases))[:budget])) for _ in range(draws)])
        cells = [f"{ours[k]:.3f} | {others[:, k].mean():.3f} ± {others[:, k].std():.3f} | "
                 f"{100 * (others[:, k] < ours[k]).mean():.0f}%" for k in range(2)]
        lines.append(f"| {budget} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of scans with full labels")
    parser.add_argument("--seeds", type=int, default=20, help="random draws of slices")
    parser.add_argument("--draws", type=int, default=1000, help="random draws of volumes")
    parser.add_argument("--budgets", type=int, nargs="+", default=[4, 8, 16], help="numbers of volumes")
    given = parser.parse_args()
    device = resolve_device("auto")
    content = checkpoint.read(RunFolder(given.run).checkpoint, device)
    config = checkpoint.config_of(content)
    network = RegistrationNet().to(device).eval()
    network.load_state_dict(content["registration"])
    settings = replace(config.data, data_dir=str(given.data_dir))
    found = [case for case in find_cases(settings.dataset, given.data_dir) if case.label is not None]
    cases = prepare(found, settings)
    dice = [dice_by_slice(case, network, config, device) for case in cases]
    print(f"{len(cases)} volumes, {given.seeds} seeds\n")
    print("\n".join(slice_table(cases, dice, given.seeds)))
    print(f"\n{given.draws} draws\n")
    print("\n".join(volume_table(cases, dice, given.budgets, given.draws)))


if __name__ == "__main__":
    main()
