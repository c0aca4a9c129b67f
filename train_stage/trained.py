"""The model that a run has trained so far, rebuilt from its newest checkpoint for export and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from manifests.errors import InputError
from manifests.schema import Geometry
from train_stage.chat import ChatEncoder
from train_stage.checkpoint import newest
from train_stage.config import ResolvedPhase, TrainConfig
from train_stage.export import generation_settings
from train_stage.export_marker import origin_of
from train_stage.model import AsvrModel
from train_stage.parts import load_trainable
from train_stage.prepare import PhaseInputs, open_inputs
from train_stage.tensor_files import load_weights
from train_stage.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Trained:
    """A trained model on the CPU, and what is needed to use it as it was trained.

    chat_template is Jinja; stop_tokens end an answer of it, see `ChatEncoder.stop_tokens`. The LLaVA's generation config
    says the latter too.
    """

    model: AsvrModel
    tokenizer: PreTrainedTokenizerBase
    geometry: Geometry
    chat_template: str
    stop_tokens: list[int]
    phase: ResolvedPhase
    step: int
    final: bool
    """Whether that was the phase's last step."""
    inputs: PhaseInputs
    origin: dict[str, Any]
    """Which checkpoint it is, see `origin_of`."""


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
        tokenizer = load_tokenizer(config.model)
        encoder = ChatEncoder(tokenizer, config.model.image_token)
        stop_tokens = encoder.stop_tokens(phase.template)
        inputs.model.llava.generation_config = generation_settings(tokenizer, stop_tokens)
        return Trained(
            model=inputs.model.eval(),
            tokenizer=tokenizer,
            geometry=inputs.geometry,
            chat_template=encoder.chat_template(phase.template),
            stop_tokens=stop_tokens,
            phase=phase,
            step=checkpoint.step,
            final=checkpoint.final,
            inputs=inputs,
            origin=origin_of(checkpoint, phase.name),
        )
    raise InputError(f"there is no checkpoint in {config.output}: train first")
