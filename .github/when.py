"""When does replay help? Both arms on one kind of question each, for the README's table.

when.py FOLDER [SEEDS]    runs what is not there yet (3 seeds, one after the other), prints the table
"""
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import rlep
from evidence import DEMO, plus_minus

KINDS = {  # the README's name: products in a sum, the largest digit in them
    "two products": (2, 9),
    "three products": (3, 9),
    "four products": (4, 9),
    "three products of digits up to 4": (3, 4),
}
STEPS = (6, 24)


def write_questions(path: Path, products: int, largest: int) -> None:
    """768 different questions, spelt as the embedded ones, the same ones each time."""
    rng, rows = random.Random(0), {}
    while len(rows) < 768:
        pairs = [(rng.randint(0, largest), rng.randint(0, largest)) for _ in range(products)]
        question = "+".join(f"{a}*{b}" for a, b in pairs) + " mod 10 = "
        prompt = [{"role": "user", "content": question}]  # a chat list is taken as it is
        rows[question] = {"prompt": prompt, "answer": sum(a * b for a, b in pairs) % 10}
    rlep.write_rows(path, list(rows.values()))


def main(folder: str, seeds: str = "3") -> None:
    """Runs every kind, and prints a row of each."""
    torch.set_num_threads(1)
    kinds = Path(folder)
    kinds.mkdir(parents=True, exist_ok=True)
    lines = ["| questions | base, % | vanilla RL at the end, % | "
             + " | ".join(f"RLEP minus vanilla RL, step {step}" for step in STEPS) + " |",
             "|---" * (3 + len(STEPS)) + "|"]
    for name, (products, largest) in KINDS.items():
        data = kinds / f"{products}products-{largest}.jsonl"
        write_questions(data, products, largest)
        runs = []
        for seed in range(int(seeds)):
            out = f"{data.with_suffix('')}-seed{seed}"
            words = ["--seed", f"{seed}", "--threads", "1", *DEMO]
            base = rlep.make_base(rlep.parse(["run", *words])[1], kinds / f"base{seed}")
            if rlep.main(["run", *words, "--model", base, "--data", str(data), "--out", out]) != 0:
                raise SystemExit(f"{out} did not end well")
            runs.append(rlep.saved_row(Path(out) / "summary.json"))
        curves = [(dict(run["vanilla"]["curve"]), dict(run["rlep"]["curve"])) for run in runs]
        cells = [plus_minus([100 * vanilla[0] for vanilla, _ in curves]),
                 plus_minus([100 * vanilla[STEPS[-1]] for vanilla, _ in curves])]
        for step in STEPS:
            cells.append(plus_minus([100 * (ours[step] - vanilla[step]) for vanilla, ours in curves]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
