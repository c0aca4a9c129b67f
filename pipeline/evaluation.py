"""`asvr eval`: held-out losses of a run, answers of a run or an export to held-out questions, and a file of each."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.atomic import make_folder, storage_errors, write_atomically
from manifests.decode import Reject
from manifests.errors import InputError
from manifests.messages import IMAGE
from manifests.records import BadRecord, Record, image_id_of, read_records
from pipeline.evaluated import ANSWERS, FOLDER, MADE_FROM, RESULTS, held_out_of, made_from_run, records_digests
from pipeline.extras import needs
from pipeline.progress import ProgressLine
from train_stage.config import CONFIG_NAME, TrainConfig

if TYPE_CHECKING:
    from train_stage.config import ValidationConfig
    from train_stage.evaluate import Answer, Question

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """The held-out data: files of records with their image roots, and token sets for the losses, if any."""

    data: tuple[tuple[str, str], ...] = ()
    manifests: tuple[str, ...] = ()
    limit: int | None = None
    max_new_tokens: int = 16


def evaluate(
    where: Path, asked: Asked, out: Path | None = None, *, config: TrainConfig | None = None
) -> dict[str, Any]:
    """Evaluate the run or the export in `where`; what was measured, as it stands in OUT/results.json.

    A run gives losses and answers, an export answers. `config` is by default what the run was trained with last. Raises InputError when there is neither, or no held-out data.
    """
    with needs("train"):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        if (where / CONFIG_NAME).is_file() and not (where / "preprocessor_config.json").is_file():
            found, answers = _of_run(where, asked, config)
            out = out or where / FOLDER
        else:
            found, answers = _of_export(where, asked)
            out = out or where.resolve().parent / FOLDER
    with storage_errors("write", out):
        make_folder(out)
        lines = "".join(json.dumps(_row(answer)) + "\n" for answer in answers)
        write_atomically(out / ANSWERS, lines.encode())
        write_atomically(out / RESULTS, (json.dumps(found, indent=2) + "\n").encode())
    return found


def _of_run(run: Path, asked: Asked, config: TrainConfig | None) -> tuple[dict[str, Any], list[Answer]]:
    from train_stage.__main__ import read_config
    from train_stage.checkpoint import content_digest
    from train_stage.evaluate import answer_questions
    from train_stage.export import make_processor
    from train_stage.trained import load_trained

    config = (config or read_config(run / CONFIG_NAME)).model_copy(update={"output": str(run)})
    trained = load_trained(config)
    validation = _held_out(config, trained.phase.name, asked)
    limit = asked.limit or (config.eval.limit if config.eval and not asked.data else None)
    made_from = made_from_run(config, trained.phase.name, trained.origin, validation, limit, content_digest)
    losses = _losses(config, trained, validation)
    processor = make_processor(trained.model, trained.tokenizer, trained.geometry, trained.chat_template)
    questions, left_out = read_questions([(own.path, own.image_root) for own in validation.data], limit)
    with ProgressLine("answers", noun="questions") as line:
        answers = answer_questions(
            trained.model.llava, processor, questions, max_new_tokens=asked.max_new_tokens, progress=line.update
        )
    what = {"phase": trained.phase.name, "step": trained.step, "final": trained.final}
    return {**what, "losses": losses, **_score(answers, left_out), MADE_FROM: made_from}, answers


def _held_out(config: TrainConfig, phase: str, asked: Asked) -> ValidationConfig:
    from train_stage.config import DataConfig, ValidationConfig

    if asked.data:
        data = tuple(DataConfig(path=path, image_root=root) for path, root in asked.data)
        return ValidationConfig(data=data, manifests=asked.manifests)
    validation = held_out_of(config, phase)
    return validation.model_copy(update={"manifests": asked.manifests or validation.manifests})


def _losses(config: TrainConfig, trained: Any, validation: ValidationConfig) -> dict[str, Any]:
    import torch

    from train_stage.prepare import hold_out
    from train_stage.ranks import Ranks
    from train_stage.validation import validate

    held_out = hold_out(config, trained.phase, validation, trained.inputs)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trained.model.to(device)
    found = validate(
        model, model, held_out, Ranks(0, 1, device), step=trained.step, seed=config.seed, workers=config.workers
    )
    return asdict(found)


def _of_export(export: Path, asked: Asked) -> tuple[dict[str, Any], list[Answer]]:
    if not (export / "config.json").exists():
        raise InputError(
            f"{export} is neither a run nor an export: give the output folder of asvr train, or its export"
        )
    import torch

    from train_stage.evaluate import answer_questions, load_exported
    from train_stage.export_marker import read_origin

    if not asked.data:
        raise InputError(f"{export} is an export, which remembers no held-out data: give --data and --image-root")
    questions, left_out = read_questions(asked.data, asked.limit)
    model, processor = load_exported(export, device="cuda" if torch.cuda.is_available() else "cpu")
    with ProgressLine("answers", noun="questions") as line:
        answers = answer_questions(
            model, processor, questions, max_new_tokens=asked.max_new_tokens, progress=line.update
        )
    made_from = {
        "model": "export",
        "checkpoint": read_origin(export),
        "records": records_digests(path for path, _ in asked.data),
        "limit": asked.limit,
    }
    return {"export": export.resolve().name, **_score(answers, left_out), MADE_FROM: made_from}, answers


def _score(answers: Sequence[Answer], left_out: int) -> dict[str, Any]:
    from train_stage.evaluate import accuracy

    return {
        "questions": len(answers),
        "records_not_asked": left_out,
        "accuracy": accuracy(answers) if answers else None,
    }


def read_questions(data: Iterable[tuple[str, str]], limit: int | None = None) -> tuple[list[Question], int]:
    """The questions of LLaVA records, the first `limit`, and how many records ask none.

    Every exchange of a record about one picture is a question of its own, without those before it; a record without a
    picture, with several, or that cannot be read is not asked. Image roots are folders of this machine here.
    """
    from train_stage.evaluate import Question

    found: list[Question] = []
    left_out = 0
    data = list(data)
    records_digests(path for path, _ in data)  # they are all there
    for path, root in data:
        for record in read_records(path):
            exchanges = _exchanges(record)
            left_out += not exchanges
            found += [Question(Path(root, image), question, answer) for image, question, answer in exchanges]
    return (found if limit is None else found[:limit]), left_out


def _exchanges(record: Record | BadRecord) -> list[tuple[str, str, str]]:
    from train_stage.templates import BadSample, read_talk

    if isinstance(record, BadRecord) or len(record.images) != 1:
        return []
    try:
        image = image_id_of(record.images[0])
        pairs = read_talk(record.conversations).pairs
    except (BadSample, Reject):
        return []
    return [(image, question.replace(IMAGE, "").strip(), answer) for question, answer in pairs]


def _row(answer: Answer) -> dict[str, Any]:
    asked = answer.question
    return {
        "image": str(asked.image),
        "question": asked.question,
        "expected": asked.answer,
        "answer": answer.text,
        "correct": answer.correct,
    }
