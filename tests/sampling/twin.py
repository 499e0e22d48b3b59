"""One sequence's sampling as TGIS does it, of torch and transformers' processors: slow, obvious."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    ExponentialDecayLengthPenalty,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from tgis.types import DetailParams, SamplingParams, TokenDetails


class StableTopP(LogitsProcessor):
    """Top-p where scores tie: of equals the lower ids go first. torch.sort may shuffle equals."""

    def __init__(self, top_p: float) -> None:
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ordered, order = scores.sort(stable=True)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
        drop[:, -1] = False
        return scores.masked_fill(drop.scatter(1, order, drop), -torch.inf)


class Twin:
    """Remembers one sequence and chooses its tokens one by one."""

    top_p_warper: type[LogitsProcessor] = TopPLogitsWarper

    def __init__(
        self, params: SamplingParams, details: DetailParams, prompt: Sequence[int], eos: list[int]
    ) -> None:
        self.params = params
        self.details = details
        self.ids = list(prompt)
        self.prompt_length = len(prompt)
        self.eos = eos
        self.generator = torch.Generator("cpu").manual_seed(params.seed)

    def process(self, logits: Tensor) -> Tensor:
        p = self.params
        num_generated = len(self.ids) - self.prompt_length
        chain = LogitsProcessorList()
        if num_generated < p.min_new_tokens:
            chain.append(
                MinNewTokensLengthLogitsProcessor(self.prompt_length, p.min_new_tokens, self.eos)
            )
        elif p.length_penalty_decay != 1:
            penalty = (p.length_penalty_start, p.length_penalty_decay)
            chain.append(ExponentialDecayLengthPenalty(penalty, self.eos, self.prompt_length))
        if p.repetition_penalty != 1:
            chain.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
        if p.do_sample:
            chain.append(TemperatureLogitsWarper(p.temperature))
            if p.top_k:
                chain.append(TopKLogitsWarper(p.top_k))
            if p.top_p < 1:
                chain.append(self.top_p_warper(p.top_p))
            if 0 < p.typical_p < 1:
                chain.append(TypicalLogitsWarper(p.typical_p))
        scores: Tensor = chain(torch.tensor([self.ids]), logits[None].clone())[0]
        return scores

    def step(self, logits: Tensor) -> tuple[int, TokenDetails]:
        scores = self.process(logits)
        if self.params.do_sample:
            probs = scores.softmax(-1)
            noise = torch.empty_like(probs).exponential_(1, generator=self.generator)
            token = int((probs / noise).argmax())
        else:
            token = int(scores.argmax())
        self.ids.append(token)
        return token, details_of(scores, token, self.details, generated=True)


def details_of(scores: Tensor, token: int, wanted: DetailParams, generated: bool) -> TokenDetails:
    """Section 10 of the TGIS api, word for word."""
    logprobs = scores.log_softmax(-1)
    top: list[int] = []
    if wanted.top_n:
        n = min(wanted.top_n, len(scores))
        shown = scores >= scores.sort(descending=True).values[n - 1]
        if generated:
            shown &= scores > -torch.inf
        top = shown.nonzero().flatten().tolist()[: 4 * n]
    if wanted.logprobs:
        top.sort(key=lambda i: (-float(logprobs[i]), i))
    return TokenDetails(
        logprob=float(logprobs[token]) if wanted.logprobs else 0.0,
        rank=1 + int((scores > scores[token]).sum()) if wanted.ranks else 0,
        top=tuple((i, float(logprobs[i]) if wanted.logprobs else 0.0) for i in top),
    )
