"""Multitask prompt tuning: one prompt, turned to each task by a product of low rank.

Wang et al. 2023, https://arxiv.org/abs/2303.02861.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeAlias

from peft_any.backend import from_numpy_like, is_array, namespace
from peft_any.contract import Array, Fresh, Params, Prepended, Shape
from peft_any.errors import ConfigError, ShapeError
from peft_any.initial import normal
from peft_any.prompts import before

Tasks: TypeAlias = Array | Sequence[int]
_SOURCES = "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK"


class MultitaskPromptTuningConfig(Prepended, peft_type="MULTITASK_PROMPT_TUNING", prefix="prompt_"):
    """x′ = [P ⊙ (Cₜ·Rₜ); x]: the prompt of task t, before the embedded input x (..., tokens, d).

    `prompt_embeddings` P (n·T, d), n = `num_transformer_submodules`, T = `num_virtual_tokens` and
    d = `token_dim`, is all tasks'; each of `num_tasks` has a row of `prefix_task_cols` (tasks,
    n·T, k) and of `prefix_task_rows` (tasks, k, d), k = `num_ranks`.

    prompt_tuning_init: how Hugging Face PEFT starts; here "RANDOM" (P standard normal, C and R of
        standard deviation 0.02). For a source task's prompt load its file, and see `of_source`.
    """

    tables: ClassVar[tuple[str, ...]] = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"

    prompt_tuning_init: Literal[
        "RANDOM", "TEXT", "SAMPLE_VOCAB", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK",
        "ONLY_SOURCE_SHARED",
    ] = "RANDOM"  # fmt: skip
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    def shapes(self) -> dict[str, Shape]:
        """P, C and R."""
        count, d = self.size("num_virtual_tokens") * self.submodules, self.size("token_dim")
        tasks, k = self.size("num_tasks"), self.size("num_ranks")
        return {
            "prompt_embeddings": normal(count, d),
            "prefix_task_cols": normal(tasks, count, k, std=0.02),
            "prefix_task_rows": normal(tasks, k, d, std=0.02),
        }

    def init(self, new: Fresh) -> Params:
        """Draw P, C and R."""
        if self.prompt_tuning_init != "RANDOM":
            raise ConfigError(
                f"{self.where}: prompt_tuning_init={self.prompt_tuning_init!r} cannot be computed "
                "here: give 'RANDOM', or load the source task's file (and see `of_source`)"
            )
        return super().init(new)

    def of_source(self, p: Params, init: str, task: int = 0) -> Params:
        """Start one task's parameters from those of source tasks, as Hugging Face PEFT does.

        Parameters
        ----------
        p : dict of arrays
            The source's.
        init : {"AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK"}
            The mean of the tasks' C and R, or those of `task`.
        task : int

        Raises
        ------
        ConfigError
            For another way to start, or a task that is not there.
        """
        tasks = p["prefix_task_cols"].shape[0]
        if init not in _SOURCES or not 0 <= task < tasks:
            raise ConfigError(
                f"{self.where}: {init!r} with task {task} cannot start a prompt: give one of "
                f"{', '.join(_SOURCES)}, and a task from 0 to {tasks - 1}"
            )
        mean = init == "AVERAGE_SOURCE_TASKS"
        found = dict(p)
        for name in ("prefix_task_cols", "prefix_task_rows"):
            xp = namespace(p[name])
            found[name] = (
                xp.mean(p[name], axis=0, keepdims=True) if mean else p[name][task : task + 1, :, :]
            )
        return found

    def prompts(self, p: Params, task_ids: Tasks) -> Array:
        """Give the virtual tokens of tasks (batch,): (batch, n·T, d)."""
        cols, rows = p["prefix_task_cols"], p["prefix_task_rows"]
        chosen: Any = task_ids
        if not is_array(chosen):
            strange = [t for t in chosen if not 0 <= t < cols.shape[0]]
            if strange or not len(chosen):
                raise ShapeError(
                    f"{self.where}: tasks {strange} have no prompt: there are {cols.shape[0]}, "
                    "numbered from 0, and each input needs one"
                )
            chosen = from_numpy_like(list(chosen), cols)
        xp = namespace(cols)
        turned = xp.take(cols, chosen, axis=0) @ xp.take(rows, chosen, axis=0)
        return p["prompt_embeddings"] * turned

    def prepend(
        self, p: Params, embeds: Array, submodule: int = 0, *, task_ids: Tasks | None = None
    ) -> Array:
        """Put each input's prompt before it: embeds (batch, tokens, d), one task for each.

        One task alone stands for all inputs; where there is but one, it need not be named. See
        `prompts.before`.
        """
        if task_ids is None and (several := p["prefix_task_cols"].shape[0]) > 1:
            raise ConfigError(
                f"{self.where}: a call cannot choose among {several} tasks: give it task_ids, a "
                "number from 0 for each input"
            )
        task_ids = (0,) if task_ids is None else task_ids
        rows = self.prompts(p, task_ids)
        if rows.shape[0] not in (1, *embeds.shape[:1]) or (embeds.ndim != 3 and rows.shape[0] > 1):
            raise ShapeError(
                f"{self.where}: {rows.shape[0]} tasks cannot stand for embeds of shape "
                f"{tuple(embeds.shape)}: give one for each input of (batch, tokens, d)"
            )
        return before(self, rows[0, :, :] if rows.shape[0] == 1 else rows, embeds, submodule)
