"""What makes the README's evidence: every arm over the seeds, their table and pictures.

bash run.sh evidence               ten seeds, two at a time, then the report; started again, it goes on
evidence.py seed N FOLDER          all arms of one seed, each a run folder below FOLDER/seedN
evidence.py report FOLDER          FOLDER/table.md, curves.png and evidence.png, of all seeds in it
evidence.py pairs RUN [RUN ...]    the same of runs of `rlep.py run` alone, into the first one's parent
"""
import random
import sys
from pathlib import Path
from statistics import fmean, stdev

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
import rlep

# Student's t for a 95% interval of the mean of 2 to 10 seeds (1 to 9 degrees of freedom).
T95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]
VANILLA, RLEP = "vanilla RL", "RLEP, M = 2"
ARMS = {  # the README's name of an arm: its folder below seedN
    VANILLA: "main/vanilla",
    RLEP: "main/rlep",
    "vanilla RL, 48 steps": "twice",
    "4 supervised steps on the pool, then 20 of vanilla RL": "supervised_first",
    "RLEP, M = 1": "m1",
    "RLEP, M = 4": "m4",
    "RLEP, M = 2, symmetric clip (0.2 / 0.2)": "symmetric_clip",
}
SUPERVISED_STEPS = 4
# The settings of the embedded problems by name, as with --model the defaults are others.
DEMO = [word for name, value in rlep.EMBEDDED.items() for word in (f"--{name}", f"{value}")]


# ---- The runs ------------------------------------------------------------------------------------
def run_seed(seed: int, folder: Path) -> None:
    """All arms of one seed; finished ones are left as they are."""
    main = folder / f"seed{seed}/main"
    base, pool = ["--model", f"{main}/base/policy", *DEMO], ["--pool", f"{main}/pool.jsonl"]

    def command(name: str, arm: str, *flags: str) -> None:
        words = [name, "--seed", f"{seed}", "--threads", "1", "--out", f"{folder}/seed{seed}/{arm}"]
        if rlep.main([*words, *flags]) != 0:
            raise SystemExit(f"seed {seed}: {arm} did not end well")

    command("run", "main")
    command("train", "twice", *base, "--steps", "48")
    started = folder / f"seed{seed}/supervised_policy"
    if not started.exists():
        _, config = rlep.parse(["train", *base, *pool, "--seed", f"{seed}"])
        supervise(config, started)
    command("train", "supervised_first", "--model", f"{started}", *DEMO, "--steps", "20")
    command("train", "m1", *base, *pool, "--replays", "1")
    command("train", "m4", *base, *pool, "--replays", "4")
    command("train", "symmetric_clip", *base, *pool, "--clip_high", "0.2")


def supervise(config: rlep.Config, folder: Path) -> None:
    """The control: the first steps imitate up to 16 pool answers to each of their questions."""
    problems, held_out = rlep.load_problems(config)
    policy = rlep.Policy(config, problems + held_out)
    pool = rlep.ExperiencePool.load(config.pool)
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=config.learning_rate, weight_decay=0.1)
    for step in range(1, SUPERVISED_STEPS + 1):
        batch = rlep.questions_of_step(problems, config, step)
        for first in range(0, len(batch), config.minibatch_prompts):
            answers = []
            for problem in batch[first:first + config.minibatch_prompts]:
                rng = random.Random(rlep.seed_of(config.seed, "supervised", step, problem.key))
                for text in pool.draw(problem.question, config.group_size, rng, problem.chat):
                    response = policy.encode_answer(problem, text)
                    answers.append(rlep.Answer(policy.encode_prompt(problem), response))
            if answers:
                logprobs, mask = policy.logprobs(answers, temperature=1.0)
                loss = -logprobs.sum() / mask.sum()  # minus the mean log-prob of the tokens
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    policy.save(folder)


# ---- The table -----------------------------------------------------------------------------------
def read_arms(folder: Path) -> dict[str, dict[int, dict]]:
    """{arm: {seed: summary}} of the finished runs in a folder of seeds."""
    arms = {}
    for name, place in ARMS.items():
        for path in sorted(folder.glob(f"seed*/{place}/summary.json")):
            summary = rlep.saved_row(path)
            if place == "supervised_first":  # its steps come after the supervised ones
                summary["curve"] = [[s + SUPERVISED_STEPS, share] for s, share in summary["curve"]]
            arms.setdefault(name, {})[summary["seed"]] = summary
    return arms


def interval(values: list[float]) -> tuple[float, float]:
    """The mean over seeds, and half its 95% interval (0 for one seed)."""
    if len(values) == 1:
        return values[0], 0.0
    return fmean(values), T95[len(values) - 2] * stdev(values) / len(values)**0.5


def steps_to_best(curve: list, vanilla: list) -> float | None:
    """The first evaluated step at or above vanilla RL's best, as a share of vanilla RL's steps;
    None if there is none."""
    best = max(share for _, share in vanilla)
    steps = [step for step, share in curve if share >= best]
    return steps[0] / vanilla[-1][0] if steps else None


def table(arms: dict) -> str:
    """Markdown: a row an arm, all differences paired by seed."""
    lines = ["| arm | seeds | mean@k at the end, % | minus vanilla RL | steps to vanilla RL's best, "
             "share of its steps | pass@k, % | entropy |", "|---" * 7 + "|"]
    for name, seeds in arms.items():
        pairs = [(summary, arms[VANILLA][seed]) for seed, summary in seeds.items()
                 if seed in arms[VANILLA]]
        gains = [100 * (own["mean_at_k"] - base["mean_at_k"]) for own, base in pairs]
        shares = [steps_to_best(own["curve"], base["curve"]) for own, base in pairs]
        reached = [share for share in shares if share is not None]
        cells = [
            plus_minus([100 * summary["mean_at_k"] for summary in seeds.values()]),
            f"{plus_minus(gains)} ({min(gains):+.1f} to {max(gains):+.1f})",
            f"{fmean(reached):.2f} ({min(reached):.2f} to {max(reached):.2f})" if reached else "-",
            plus_minus([100 * summary["pass_at_k"] for summary in seeds.values()]),
            plus_minus([summary["entropy"] for summary in seeds.values()
                        if summary["entropy"] is not None], 2),
        ]
        if len(reached) < len(shares):
            cells[2] += f"; {len(shares) - len(reached)} of {len(shares)} never"
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plus_minus(values: list[float], digits: int = 1) -> str:
    """Mean and half interval as text, "-" without values."""
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def differences(arms: dict) -> str:
    """RLEP minus vanilla RL at each evaluation, as Markdown."""
    lines = ["| step | vanilla RL, % | RLEP, % | difference | seeds ahead |", "|---" * 5 + "|"]
    seeds = [seed for seed in arms[RLEP] if seed in arms[VANILLA]]
    both = [(dict(arms[VANILLA][s]["curve"]), dict(arms[RLEP][s]["curve"])) for s in seeds]
    for step in both[0][0]:
        base = [100 * vanilla[step] for vanilla, _ in both]
        own = [100 * ours[step] for _, ours in both]
        gains = [after - before for before, after in zip(base, own)]
        lines.append(f"| {step} | {fmean(base):.1f} | {fmean(own):.1f} | {plus_minus(gains)} | "
                     f"{sum(gain > 0 for gain in gains)} of {len(gains)} |")
    return "\n".join(lines)


# ---- The pictures --------------------------------------------------------------------------------
GREY, BLUE, ORANGE = "#7d8590", "#4c8fd6", "#e08a1e"  # readable on white and on black


def draw_arm(axis, seeds: dict, color: str, label: str, thin: bool) -> list:
    """An arm's mean curve with its 95% band, and thin lines for its seeds; returns the means."""
    curves = [dict(summary["curve"]) for summary in seeds.values()]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    points = [interval([100 * curve[step] for curve in curves]) for step in steps]
    means = [mean for mean, _ in points]
    axis.plot(steps, means, color=color, linewidth=2.4, label=label, zorder=3)
    axis.fill_between(steps, [mean - half for mean, half in points],
                      [mean + half for mean, half in points], color=color, alpha=0.18, linewidth=0)
    for curve in curves if thin else []:
        axis.plot(steps, [100 * curve[step] for step in steps], color=color, linewidth=0.6, alpha=0.6)
    return list(zip(steps, means))


def tidy(axis) -> None:
    """No frame but the two axes, in a colour that light and dark pages show."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GREY)
    axis.tick_params(colors=GREY)
    axis.grid(axis="y", color=GREY, alpha=0.25)
    axis.set_ylim(0, 100)


def draw_both(arms: dict, path: Path, highest: float = 100) -> None:
    """Vanilla RL and RLEP, with a mark where RLEP's mean passes vanilla RL's best."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    vanilla = draw_arm(axis, arms[VANILLA], GREY, VANILLA, thin=True)
    ours = draw_arm(axis, arms[RLEP], BLUE, RLEP, thin=True)
    tidy(axis)
    axis.set_ylim(0, highest)
    best = max(mean for _, mean in vanilla)
    axis.axhline(best, color=ORANGE, linewidth=1, linestyle="--")
    passed = [(step, mean) for step, mean in ours if mean >= best]
    if passed:
        step, mean = passed[0]
        axis.plot([step], [mean], "o", color=ORANGE, markersize=9, zorder=4)
        axis.annotate(f"RLEP passes vanilla RL's best\nafter {step} of {vanilla[-1][0]} steps",
                      (step, mean), (0.58, 0.08), textcoords="axes fraction", color=ORANGE,
                      fontsize=12, arrowprops={"arrowstyle": "-", "color": ORANGE})
    axis.set_xlabel("training step", color=GREY, fontsize=11)
    axis.set_ylabel("held-out accuracy, mean@4 (%)", color=GREY, fontsize=11)
    axis.set_xticks([step for step, _ in vanilla[::2]])
    axis.legend(loc="upper left", frameon=False, labelcolor="linecolor", fontsize=12)
    figure.savefig(path, dpi=130, transparent=True)


def draw_panels(arms: dict, path: Path) -> None:
    """A small panel for every arm but vanilla RL, beside which each is drawn, on one scale."""
    others = [name for name in arms if name != VANILLA]
    rows = -(-len(others) // 3)
    figure = Figure(figsize=(9, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False).flat
    for axis, name in zip(panels, others):
        draw_arm(axis, arms[VANILLA], GREY, VANILLA, thin=False)
        draw_arm(axis, arms[name], BLUE, name, thin=False)
        tidy(axis)
        axis.set_xticks(range(0, 49, 12))
        axis.set_title(name.replace(", then", ",\nthen").replace(", symm", ",\nsymm"), color=BLUE,
                       fontsize=11)
    figure.supxlabel("training step (grey: vanilla RL)", color=GREY, fontsize=11)
    figure.supylabel("held-out accuracy, mean@4 (%)", color=GREY, fontsize=11)
    figure.savefig(path, dpi=130, transparent=True)


def report(arms: dict, folder: Path) -> None:
    """Writes the tables and pictures of the arms into a folder."""
    text = f"{table(arms)}\n\n{differences(arms)}\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)
    highest = max(100 * share for seeds in (arms[VANILLA], arms[RLEP]) for summary in seeds.values()
                  for _, share in summary["curve"])
    draw_both(arms, folder / "curves.png", highest=10 * (highest // 10 + 1))
    if len(arms) > 2:
        draw_panels(arms, folder / "evidence.png")


def main(words: list[str]) -> None:
    """Runs one of the commands above."""
    if words[:1] == ["seed"]:
        run_seed(int(words[1]), Path(words[2]))
    elif words[:1] == ["report"]:
        report(read_arms(Path(words[1])), Path(words[1]))
    elif words[:1] == ["pairs"] and words[1:]:
        arms = {}
        for run in map(Path, words[1:]):
            for name, place in ((VANILLA, "vanilla"), (RLEP, "rlep")):
                summary = rlep.saved_row(run / place / "summary.json")
                if not summary:
                    raise SystemExit(f"{run}: is not finished")
                arms.setdefault(name, {})[run] = summary
        report(arms, Path(words[1]).parent)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
