"""TimeViper as a model of lmms-eval 0.7.3: `--model timeviper --model_args weights=...,feature_store=...`.

Imported only by lmms-eval. Videos are named by path and read from the feature store; nothing is decoded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from timeviper_platform.evaluation.evaluator import AnsweringConfig
from timeviper_platform.evaluation.harness.stored_videos import (
    Asked,
    FrameProtocol,
    StoredVideo,
    StoredVideoAnswerer,
    video_path,
)

logger = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 128


class TimeViperSimple(lmms):
    """Tasks of a text with visuals, and those of log-likelihoods (`--force_simple`).

    Args:
        weights: weights folder at any URI.
        feature_store: URI of the store that has the videos.
        media_root: folder that was preprocessed, if videos are known by their path below it.
        protocol: paper = the first 256 frames at 1 fps; whole = `max_frames` spread over the video.
        max_frames: of protocol whole.
        answer_prefix: start of every answer, such as 'Best Option: ('.
        dtype: float32 or bfloat16.
        num_threads: PyTorch's CPU threads.
    """

    is_simple = True

    def __init__(
        self,
        weights: str,
        feature_store: str,
        *,
        media_root: str = "",
        protocol: FrameProtocol = "paper",
        max_frames: int | None = None,
        answer_prefix: str = "",
        dtype: str = "bfloat16",
        device: str | None = "cuda",
        num_threads: int = 1,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        config = AnsweringConfig(
            max_frames=max_frames,
            dtype=dtype,  # type: ignore[arg-type]  # checked by AnsweringConfig
            device=device or "cuda",
            num_threads=num_threads,
        )
        self._answerer = StoredVideoAnswerer(
            weights=weights,
            feature_store=feature_store,
            config=config,
            protocol=protocol,
            media_root=media_root,
            answer_prefix=answer_prefix,
        )
        self._warned: set[str] = set()

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        asked = []
        for request in requests:
            context, options, doc_to_visual, doc_id, task, split = request.args
            asked.append((self._asked(context, doc_to_visual, doc_id, task, split), options))
        return self._generate(requests, asked)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Returns losses, lower is better, as other models of lmms-eval do: its accuracy takes the lowest."""
        asked, texts = [], []
        for request in requests:
            if len(request.args) == 2:  # of a text alone
                asked.append(Asked(parts=(request.args[0],)))
                texts.append(request.args[1])
                continue
            context, target, doc_to_visual, doc_id, task, split = request.args
            asked.append(self._asked(context, doc_to_visual, doc_id, task, split))
            texts.append(target if isinstance(target, str) else target(self._doc(task, split, doc_id)))
        self._answerer.check(asked)
        losses: dict[int, tuple[float, bool]] = {}
        for index, loss, is_greedy in self._shown(self._answerer.losses(asked, texts), len(requests)):
            losses[index] = (loss, is_greedy)
        return [losses[index] for index in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("timeviper answers one question per request; several rounds need another model")

    def _doc(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]

    def _asked(
        self, context: str | list[str], doc_to_visual: Callable[[Any], Any], doc_id: int, task: str, split: str
    ) -> Asked:
        visuals = doc_to_visual(self._doc(task, split, doc_id)) or []
        text = context[0] if isinstance(context, list) else context
        return Asked(parts=(*(_video(visual, task) for visual in visuals), text))

    def _generate(self, requests: Sequence[Any], asked: Sequence[tuple[Asked, dict[str, Any]]]) -> list[Any]:
        self._answerer.check([question for question, _ in asked])
        found: dict[int, Any] = {}
        by_limit: dict[int, list[int]] = {}
        for index, (_, options) in enumerate(asked):
            by_limit.setdefault(int(options.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)), []).append(index)
            if options.get("do_sample") or options.get("temperature"):
                self._warn_once("timeviper's answers are greedy; do_sample and temperature of the task are ignored")
        for limit, members in by_limit.items():
            answers = self._answerer.generate([asked[index][0] for index in members], max_new_tokens=limit)
            for number, answer in self._shown(answers, len(members)):
                index = members[number]
                text = _cut(answer.text, asked[index][1].get("until"))
                found[index] = GenerationResult(text, TokenCounts(input_tokens=answer.num_prompt_tokens))
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return [found[index] for index in range(len(asked))]

    def _shown(self, items: Iterable[Any], total: int) -> Iterable[Any]:
        return tqdm(items, total=total, desc="Model Responding", disable=self.rank != 0)

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning(text)


class TimeViperChat(TimeViperSimple):
    """Tasks as messages, with clip bounds of videos."""

    is_simple = False

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        asked = []
        for request in requests:
            _, doc_to_messages, options, doc_id, task, split = request.args
            messages = ChatMessages(messages=doc_to_messages(self._doc(task, split, doc_id)))
            asked.append((self._asked_by(messages, task), options))
        return self._generate(requests, asked)

    def _asked_by(self, messages: ChatMessages, task: str) -> Asked:
        system, parts = [], []
        for message in messages.messages:
            if message.role == "assistant":
                raise ValueError(f"{task}: timeviper answers one question per request, not conversations")
            for content in message.content:
                if message.role == "system":
                    system.append(str(content.text))
                elif content.type == "text":
                    parts.append(content.text)
                elif content.type == "video":
                    parts.append(_video(content.url, task, content.start_time, content.end_time))
                else:
                    raise ValueError(f"{task}: {content.type} parts are not supported; stored features are of videos")
        return Asked(parts=tuple(parts), system="\n".join(system))


def _video(visual: Any, task: str, start_seconds: float | None = None, end_seconds: float | None = None) -> StoredVideo:
    if not isinstance(visual, str):
        raise ValueError(f"{task}: {type(visual).__name__} visuals are not supported; stored features are of videos")
    return StoredVideo(path=video_path(visual), start_seconds=start_seconds, end_seconds=end_seconds)


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or ():
        text = text.split(stop)[0] if stop else text
    return text
