"""DeepSpeed's writers of numbers: TensorBoard, W&B, CSV and Comet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from manifests.atomic import storage_errors
from manifests.errors import EnvironmentProblem, RecipeError
from train_stage.deepspeed_process import quiet

MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
"""Where DeepSpeed can write numbers to: keys of its settings."""


class Monitors:
    """DeepSpeed's TensorBoard, W&B, CSV and Comet writers, as the recipe's `deepspeed` has them; they write on rank 0.

    Files go to `folder` where the recipe gives no output_path. After the engine is made. RecipeError for settings that
    DeepSpeed refuses, EnvironmentProblem for a writer whose package is not installed.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path) -> None:
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        places = {name: {"output_path": str(folder), "job_name": name} for name in ("tensorboard", "csv_monitor")}
        own = {name: {**places.get(name, {}), **settings[name]} for name in MONITORS if name in settings}
        try:
            with storage_errors("write", folder), quiet():
                self._master = MonitorMaster(get_monitor_config(own))
        except ValidationError as error:
            raise refused_setting(error) from error
        except ImportError as error:
            named = ", ".join(f"deepspeed.{name}" for name in own)
            raise EnvironmentProblem(
                f"{named} needs a package that is missing ({error}): install or remove it"
            ) from error

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Write the values of a step by their names."""
        if self._master.enabled:
            self._master.write_events([(name, value, step) for name, value in values.items()])


def refused_setting(error: ValidationError) -> RecipeError:
    """The sentence for what DeepSpeed finds wrong with its settings."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    return RecipeError(f"DeepSpeed refuses {key} of its settings ({error.title}): {first['msg']}")
