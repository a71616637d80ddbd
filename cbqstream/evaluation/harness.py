"""Tasks of lm-eval on a model that does not fit in memory. Importing this module registers the model class `cbqstream` in lm-eval.

import lm_eval
import cbqstream.evaluation.harness

lm_eval.simple_evaluate("cbqstream", model_args={"model": "OUT"}, tasks=["piqa"])
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cbqstream.calibration.tokenizer import load_tokenizer
from cbqstream.errors import UsageError
from cbqstream.evaluation.likelihood import Request, log_likelihoods
from cbqstream.evaluation.model import EvaluatedModel, require_counts

try:
    import lm_eval
    import lm_eval.models  # registers the classes of lm-eval, which lm-eval omits if another class is registered first
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError as missing:
    raise UsageError("tasks need lm-eval. Install it: pip install 'cbqstream[eval]'.") from missing

Encoded = tuple[tuple[str, str] | None, Sequence[int], Sequence[int]]
"""Context and continuation as texts, or None if they have no texts, and the tokens of the context and of the continuation."""


@register_model("cbqstream")
class StreamedLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A model of lm-eval that computes the scores of the class `hf` of lm-eval and reads every block once for all requests of a task.

    It does not generate text.

    Args:
        model: folder of a model, quantized by this project or not.
        batch_size: requests in a batch; 4 by default.
        device: auto, cpu, cuda or cuda:N; auto by default.
        max_batch_size: ignored; lm-eval always passes it.
        options: the other fields of `EvaluationOptions`.
    """

    def __init__(
        self,
        model: str,
        batch_size: int | str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        folder = Path(model)
        options |= {"batch_size": int(batch_size or 4), "device": device or "auto"}
        if options.get("scratch") is not None:
            options["scratch"] = Path(options["scratch"])
        self._streamed = EvaluatedModel.open(folder, **options)
        self.tokenizer = load_tokenizer(folder)
        self.max_length = self._streamed.meta_model.max_length

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text.

        Raises:
            UsageError: the tokenizer has none.
        """
        if self.tokenizer.eos_token_id is None:
            raise UsageError(
                "tasks need a tokenizer with a beginning-of-sequence or end-of-sequence token. Set eos_token in tokenizer_config.json."
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that precedes a text without context: BOS, or the token that ends a text if there is no BOS."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:  # noqa: FBT001
        """Token ids of a text.

        Args:
            string: the text.
            add_special_tokens: whether special tokens are added; None adds them unless the text already begins with the text of the
                prefix token.
            unused: ignored.
        """
        if add_special_tokens is None:
            first = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not (first and string.startswith(first))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **unused: Any) -> list[tuple[float, bool]]:
        asked = []
        for _, context, continuation in requests:
            ids = (*context, *continuation)[-self.max_length - 1 :]
            asked.append(Request(ids, min(len(continuation), len(ids) - 1)))
        answers = [(scored.log_likelihood, scored.greedy) for scored in log_likelihoods(self._streamed, asked)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: FBT001, FBT002
        """Log-likelihoods of whole texts, computed in segments as long as the model supports.

        Args:
            requests: requests of lm-eval, each with one text.
            disable_tqdm: ignored.
        """
        windows: list[Encoded] = []
        counts = []
        for (text,) in (request.args for request in requests):
            found = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            made = [(None, *make_disjoint_window(window)) for window in found]
            windows += made
            counts.append(len(made))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: FBT001, FBT002
        """Raise an error, because generating text would read the whole model once for each token.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{len(requests)} requests generate text, for which each token would read the whole model once."
            " Leave out tasks of the kind generate_until."
        )


def evaluate_tasks(
    model: Path,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
    **options: Any,
) -> Mapping[str, Any]:
    """Run tasks of lm-eval on a model, with one block in memory at a time.

    Args:
        model: folder of a model, quantized by this project or not.
        tasks: names of tasks; `*` matches any text.
        num_fewshot: examples before each question; the number of the task by default.
        limit: largest number of documents of each task, from the start; all by default.
        include_path: folder with further tasks.
        options: see `EvaluationOptions`.

    Returns:
        The result of `lm_eval.simple_evaluate`.

    Raises:
        InputError: the model cannot be read.
        UsageError: a task does not exist or generates text, or a setting cannot work.
    """
    require_counts(limit=limit)
    if num_fewshot is not None and num_fewshot < 0:
        raise UsageError(f"num_fewshot is {num_fewshot}. It must not be negative.")
    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"{include_path}: no such folder. Give the folder of the tasks.")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise UsageError(f"lm-eval has no task {', '.join(unknown)}. `lm-eval ls tasks` lists them.")
    names = manager.match_tasks(list(tasks))
    writing = [name for name, task in manager.load(names)["tasks"].items() if task.OUTPUT_TYPE == "generate_until"]
    if writing:  # checked first, because the other tasks may take hours
        raise UsageError(
            f"{', '.join(writing)} generate text, for which each token would read the whole model once. Leave them out."
        )
    streamed = StreamedLM(str(model), **options)
    found: Mapping[str, Any] = lm_eval.simple_evaluate(
        streamed, tasks=names, num_fewshot=num_fewshot, limit=limit, task_manager=manager, bootstrap_iters=0
    )
    return found


def table(found: Mapping[str, Any]) -> str:
    """Table of the results in Markdown, as lm-eval prints it."""
    return str(make_table(found))
