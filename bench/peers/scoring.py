"""The published procedure for scoring candidates (megvii-model/SinglePathOneShot, Search/tester.py).

Per candidate: reset every statistic, run the calibration batches in training mode (dropout on, momentum 0.1), then
count right answers in evaluation mode. The published sizes are 200 batches of 128 and 40 batches of 200.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.peers.shufflenet import Path, State

Forward = Callable[[Tensor, Path, bool], Tensor]


@torch.no_grad()
def published_scores(
    forward: Forward,
    state: State,
    candidates: Sequence[Path],
    calibration: Sequence[Tensor],
    validation: Sequence[tuple[Tensor, Tensor]],
) -> list[float]:
    """Accuracy of every candidate.

    Args:
        forward: ``(images, path, training) -> logits``; moves the running statistics of ``state`` when training.
        state: the supernet's tensors by their published names.
        candidates: their paths.
        calibration: batches of images.
        validation: batches of images and labels.
    """
    scores = []
    for path in candidates:
        for name, value in state.items():
            if name.endswith("running_mean"):
                value.zero_()
            elif name.endswith("running_var"):
                value.fill_(1)
        for images in calibration:
            forward(images, path, True)
        correct = sum(int((forward(images, path, False).argmax(1) == labels).sum()) for images, labels in validation)
        scores.append(correct / sum(len(labels) for _, labels in validation))
    return scores
