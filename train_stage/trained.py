"""The model that a run has trained so far, rebuilt from its newest checkpoint for export and evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from manifests.errors import InputError
from manifests.schema import Geometry
from train_stage.chat import template_source
from train_stage.checkpoint import newest
from train_stage.config import ResolvedPhase, TrainConfig
from train_stage.model import AsvrModel, load_trainable
from train_stage.run import PhaseInputs, open_inputs
from train_stage.tensor_files import load_weights
from train_stage.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Trained:
    """A trained model on the CPU, and what is needed to use it as it was trained.

    chat_template is Jinja; codebook_sha256 is that of the codebook file the visual head needs, None without a head.
    """

    model: AsvrModel
    tokenizer: PreTrainedTokenizerBase
    geometry: Geometry
    chat_template: str
    codebook_sha256: str | None
    phase: ResolvedPhase
    step: int
    final: bool
    """Whether that was the phase's last step."""


def load_trained(config: TrainConfig) -> Trained:
    """The newest complete checkpoint of the last phase of `config` that has one.

    Raises InputError if no phase has a checkpoint, and what opening models and manifests raises.
    """
    for phase_config in reversed(config.phases):
        phase = config.phase(phase_config.name)
        checkpoint = newest(config.phase_folder(phase.name))
        if checkpoint is None:
            continue
        inputs: PhaseInputs = open_inputs(config, phase)
        load_trainable(inputs.model, load_weights(checkpoint.weights))
        return Trained(
            model=inputs.model.eval(),
            tokenizer=load_tokenizer(config.model),
            geometry=inputs.geometry,
            chat_template=template_source(phase.template, config.model.image_token),
            codebook_sha256=inputs.codebook_sha256,
            phase=phase,
            step=checkpoint.step,
            final=checkpoint.final,
        )
    raise InputError(f"there is no checkpoint in {config.output}: train first")
