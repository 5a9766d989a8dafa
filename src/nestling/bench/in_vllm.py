"""Greedy tokens of one model directory in vLLM on the CPU: run by its path with the Python of vLLM's own environment.

    python in_vllm.py MODEL '{"max_num_seqs": 16, ...}'

The second argument are options of vLLM's `LLM`. Says `{"versions": {...}}` when the model is ready. Then every line of
standard input is a job, `{"prompts": [[token, ...], ...], "max_tokens": n}`, answered by `{"tokens": [[...], ...]}`.
Standard output carries these lines alone; whatever else vLLM says goes to standard error.
"""

import json
import os
import sys
from importlib.metadata import version

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as many threads as OMP_NUM_THREADS says, wherever there is room
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main(model: str, options: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="float32", skip_tokenizer_init=True, **json.loads(options))

    def answer(**said: object) -> None:
        print(json.dumps(said), file=answers, flush=True)

    answer(versions={name: version(name) for name in ("vllm-cpu", "torch", "transformers")})
    for line in sys.stdin:
        job = json.loads(line)
        greedy = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], greedy, use_tqdm=False)
        answer(tokens=[list(output.outputs[0].token_ids) for output in outputs])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
