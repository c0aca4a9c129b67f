"""The ASVR objective in a plain Hugging Face `Trainer`: any LLaVA, your own data, one module around the two.

Your data set gives an `image_id` beside the usual inputs of a sample; the collator below passes it on. `Trainer` needs the
package accelerate:

    visual_loss = VisualCodesLoss(["tokens/instruct"], hidden_size=llava.config.text_config.hidden_size)
    model = LlavaWithCodes(llava, visual_loss)
    Trainer(model, TrainingArguments(..., remove_unused_columns=False), train_dataset=samples, data_collator=collate).train()
    llava.save_pretrained("trained")  # the LLaVA alone: the head has done its work
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from train_stage.library import VisualCodesLoss


class LlavaWithCodes(nn.Module):
    """A LLaVA whose loss is text loss plus visual loss.

    The visual loss is computed in `forward`, because a model on several GPUs (DistributedDataParallel) counts on all its
    parameters being used there.
    """

    def __init__(self, llava: LlavaForConditionalGeneration, visual_loss: VisualCodesLoss) -> None:
        super().__init__()
        self.llava, self.visual_loss = llava, visual_loss

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        pixel_values: Tensor,
        image_ids: list[str],
        attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`image_ids` are in the order of the images in `input_ids`."""
        outputs = self.llava(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            labels=labels,
            output_hidden_states=True,
        )
        at_image = (input_ids == self.llava.config.image_token_id).flatten().nonzero().squeeze(1)
        positions = at_image.view(len(image_ids), -1)
        visual = self.visual_loss(outputs.hidden_states[-1], positions, image_ids)
        return {"loss": outputs.loss + visual, "text_loss": outputs.loss.detach(), "visual_loss": visual.detach()}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks tensors, keeps image ids as a list. Samples here have one image and equal lengths."""
    names = [name for name in samples[0] if name != "image_id"]
    batch: dict[str, Any] = {name: torch.stack([sample[name] for sample in samples]) for name in names}
    return {**batch, "image_ids": [sample["image_id"] for sample in samples]}
