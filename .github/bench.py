"""Times training steps on random rewards, for the README's table of speed: bash run.sh bench --help.

Prints one JSON line: response tokens a second in sampling, in the update and in the whole step, and
the peak memory of the process. --updates N gives each step N mini-batches; at learning rate 0, all
steps are alike.
"""
import argparse
import contextlib
import json
import random
import resource
import sys
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import rlep


def main(words: list[str]) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser("bash run.sh bench", description=__doc__)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--prompts", required=True, help='JSON lines: {"prompt": "..."}')
    for name, default in (("group_size", 16), ("steps", 3), ("max_new_tokens", 64), ("threads", 1),
                          ("micro_tokens", 2048), ("bf16", 0), ("updates", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    problems = [rlep.Problem(row["prompt"], "0") for _, row in rlep.read_rows(given.prompts)]
    config = rlep.Config(
        model=given.model, device=given.device, bf16=given.bf16, group_size=given.group_size,
        max_new_tokens=given.max_new_tokens, learning_rate=0.0, micro_tokens=given.micro_tokens,
        minibatch_prompts=max(1, len(problems) // given.updates),
        sample_rows=len(problems) * given.group_size)
    policy = rlep.Policy(config, problems)
    policy.tokenizer.chat_template = "{{ messages[-1]['content'] }}"  # the prompts as they are
    coin = random.Random(0)
    rlep.score = lambda problem, text: coin.choice((-1.0, 1.0))
    optimizer = torch.optim.AdamW(policy.model.parameters())
    rows = []
    for step in range(1, given.steps + 2):  # the first one warms up
        pool = rlep.ExperiencePool()
        with contextlib.redirect_stdout(sys.stderr):  # its line about the step
            rows.append(rlep.train_step(policy, optimizer, problems, pool, config, step))
    rows = rows[1:]
    print(json.dumps({
        "sample_tok_s": median(row["sampled_tokens"] / row["sample_s"] for row in rows),
        "update_tok_s": median(row["sampled_tokens"] / row["update_s"] for row in rows),
        "step_tok_s": median(row["sampled_tokens"] / (row["sample_s"] + row["update_s"]) for row in rows),
        "mean_length": rows[-1]["length"],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }))


if __name__ == "__main__":
    main(sys.argv[1:])
