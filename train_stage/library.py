"""The ASVR objective for other people's training loops: head, loss and look-up of codes in one module.

It needs hidden states, the positions of the image tokens, and image ids; nothing else of this package has to be used.
`examples/huggingface_trainer.py` adds it to a plain Hugging Face `Trainer` run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from manifests.errors import InputError
from manifests.reader import open_manifest
from train_stage.batch import NO_TOKEN
from train_stage.objective_config import CodesObjective as Settings
from train_stage.objectives.codes import CodesObjective
from train_stage.tables import Tables


class VisualCodesLoss(nn.Module):
    """Mean cross-entropy of the codes at image positions, to be added to the text loss (arXiv 2506.09040, Eq. 3).

    Args:
        manifests: folders of token sets of one tokenizer.
        hidden_size: width of the hidden states.
        settings: head, shift and weight, as in a recipe; the loss is multiplied by the weight.

    Its parameters are those of the visual head: give them to your optimizer. They are not part of your model's
    checkpoints unless you put the module into the model. Raises InputError for manifests that disagree or hold features.
    """

    def __init__(self, manifests: Sequence[str | Path], hidden_size: int, settings: Settings | None = None) -> None:
        super().__init__()
        self.tables = Tables([open_manifest(path) for path in manifests])
        first = self.tables.manifests[0]
        self.objective = CodesObjective(
            settings or Settings(), hidden_size, first.codebooks(), residual=first.tokenizer.residual
        )
        # Looked up in every step, so the ids of all images are held.
        batches = (batch for own in self.tables.manifests for batch in own.iter_index(["image_id"]))
        ids = list(dict.fromkeys(name for batch in batches for name in batch["image_id"].to_pylist()))
        self._number = {name: number for number, name in enumerate(ids)}
        self._rows = self.tables.find(ids)
        self.tables.open_values(self._rows)

    def codes(self, image_ids: Sequence[str]) -> Tensor:
        """int64 (V, P, D) of the images, all their views one after the other; InputError names one without codes."""
        return self._codes_and_base_views(image_ids)[0]

    def _codes_and_base_views(self, image_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        absent = next((name for name in image_ids if name not in self._number), None)
        if absent is not None:
            raise InputError(
                f"{self.tables.where} has no codes of {absent}: leave the sample out, or tokenize the image"
            )
        nothing = np.empty((0, self.tables.spec.positions, self.tables.spec.values), dtype=np.int64)
        found = [nothing, *(self.tables.values(self._rows, self._number[name]).astype(np.int64) for name in image_ids)]
        base_view = [view == 0 for own in found for view in range(len(own))]
        return torch.from_numpy(np.concatenate(found)), torch.tensor(base_view, dtype=torch.bool)

    def forward(
        self, hidden_BLH: Tensor, positions_VP: Tensor, image_ids: Sequence[str], mask_VP: Tensor | None = None
    ) -> Tensor:
        """The weighted loss, float32 ().

        Args:
            hidden_BLH: last hidden states (B, L, H).
            positions_VP: int64 (V, P); where in the B*L flattened tokens each cell of each view is, -1 for cells without
                a token. `train_stage.image_tokens` has them for LLaVA-NeXT, whose images are several views (`anyres`).
            image_ids: of the images, as the manifests have them, in the order of their views.
            mask_VP: bool (V, P); False on padding cells (`manifests.geometry.content_mask`). Default: all count.

        Zero, with gradient zero for every parameter of the head, where nothing counts. InputError where the images have
        other views or cells than there are positions.
        """
        codes_VPD, base_view = (own.to(hidden_BLH.device) for own in self._codes_and_base_views(image_ids))
        if positions_VP.shape != codes_VPD.shape[:2]:
            raise InputError(
                f"positions_VP is {tuple(positions_VP.shape)}, but the {len(image_ids)} images have "
                f"{tuple(codes_VPD.shape[:2])} views and cells in {self.tables.where}: give every view of an image a row"
            )
        mask_VP = positions_VP != NO_TOKEN if mask_VP is None else mask_VP & (positions_VP != NO_TOKEN)
        sums = self.objective.score(hidden_BLH, positions_VP, codes_VPD, mask_VP, base_view)
        return self.objective.weight * sums.loss_sum_D.mean() / max(sums.targets, 1)
