"""What does not depend on how many cores an operator has."""

import torch


def by_threads(function):
    """What it returns by one thread, by three, and by more than there are tasks."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 64):
            torch.set_num_threads(threads)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    return results
