"""vLLM's asynchronous engine on a CPU. Arguments: model directory, precision (bf16)."""

import asyncio
import sys
from itertools import count

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from worker import Calls, Clock, work


def main() -> None:
    """Load, then work."""
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=sys.argv[1],
            dtype="bfloat16",
            max_model_len=2048,
            max_num_seqs=64,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
    )
    numbers = count()

    async def one(clock: Clock, index: int, ids: list[int], new: int) -> None:
        params = vllm.SamplingParams(
            temperature=0.0,
            min_tokens=new,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": ids}
        async for output in engine.generate(prompt, params, str(next(numbers))):
            tokens = len(output.outputs[0].token_ids)
            if tokens:
                clock.tokens(index, tokens)

    async def offer(calls: Calls) -> dict[str, object]:
        clock = Clock(calls)
        await asyncio.gather(*(one(clock, i, ids, new) for i, (ids, new) in enumerate(calls)))
        return clock.result()

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        work(lambda calls: loop.run_until_complete(offer(calls)), vllm.__version__)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
