"""OpenVINO GenAI's continuous batching pipeline. Arguments: model directory, precision."""

import sys

import openvino
import openvino_genai
from worker import Calls, Clock, work


def main() -> None:
    """Load, then work."""
    directory, precision = sys.argv[1:3]
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2  # GiB
    scheduler.dynamic_split_fuse = True
    scheduler.max_num_batched_tokens = 2048
    scheduler.max_num_seqs = 64
    scheduler.enable_prefix_caching = False
    hint = "bf16" if precision == "bf16" else "dynamic"
    properties = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    if hint == "dynamic":
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "32"
    pipeline = openvino_genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", properties)
    next_id = 0

    def run(calls: Calls) -> dict[str, object]:
        nonlocal next_id
        clock = Clock(calls)
        handles = []
        for ids, new in calls:
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = new
            config.ignore_eos = True
            config.do_sample = False
            tensor = openvino.Tensor([ids])
            handles.append(pipeline.add_request(next_id, tensor, config))
            next_id += 1
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for index, handle in enumerate(handles):
                if handle.can_read():
                    for output in handle.read().values():
                        clock.tokens(index, len(output.generated_ids))
        return clock.result()

    work(run, openvino_genai.__version__)


if __name__ == "__main__":
    main()
