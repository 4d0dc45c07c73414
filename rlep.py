"""RLEP, Reinforcement Learning with Experience rePlay (arXiv 2507.07451), in one file. MIT licence.
A language model is trained by RL, and the answers it then gets right are collected. Training starts
again from the same base model, with a few of those answers replayed beside its own at every step.
rlep.py                           all of it on embedded problems: 3 minutes on two CPU cores
rlep.py run --model A --data B    all of it on yours: we estimate an hour or two for 0.5B on a GPU
rlep.py train [--pool FILE]       one arm: RLEP with a pool, vanilla RL without
rlep.py collect --model POLICY    a policy's verified answers to the training questions
rlep.py eval --model POLICY       mean@k and pass@k on held-out questions
The method (section 3 of the paper; Eq. 1 and 5: group_advantages, Eq. 3 and 4: policy_loss):
    1. train: vanilla RL from the base model (GRPO, token mean, clip-higher)
    2. collect: that policy answers every question many times; what is correct fills the pool
    3. train --pool: RL from the base model again; G fresh and M pool answers share a baseline
Not as in the authors' code (a fork of verl; they never published their collection):
    1. a question with fewer than M pool answers uses what it has; theirs adds empty ones scored -1
    2. a replay that is too long is left out; theirs is cut and loses its end token
    3. the token mean is over the whole mini-batch (Eq. 3: one group); theirs over a micro-batch
    4. mini-batches are of questions, 512 / 64 = 8; theirs of answers, 512 * 18 / (64 * 16) = 9
    5. a mini-batch without gradient makes no step; in theirs, momentum and weight decay go on
Theirs too, but not the paper's: dual clip, unbiased std + 1e-6, old log-probs of replays.
Letters: P prompts, G fresh and M replayed answers to each, n answers, t tokens, V vocabulary."""
import argparse
import copy
import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from operator import add, mul, sub, truediv
from pathlib import Path
from statistics import fmean

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache
from transformers.cache_utils import StaticLayer

# ---- Configuration -------------------------------------------------------------------------------
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
PLAIN_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}Answer:"


@dataclass
class Config:
    """Every line is a flag, its comment the help; the defaults suit a model of 0.5B on one GPU."""
    model: str = ""  # hub id or folder; without one, run and train make a tiny base model
    chat_template_kwargs: str = "{}"  # JSON, for the chat template: '{"enable_thinking": false}'
    data: str = ""  # training problems, a .jsonl file; without one, embedded problems
    eval_data: str = ""  # held-out problems; without them, the first --eval_size of --data
    train_size: int = 1536  # training problems used, at most
    eval_size: int = 256  # held-out problems used, at most
    pool: str = ""  # experience pool to replay, a .jsonl file: with one, train is RLEP
    out: str = ""  # folder of the run; without one, runs/COMMAND-MODEL-DATA-POOL-seedN
    seed: int = 0  # decides the tiny model's weights, order of questions, sampling and replay
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # mps: wrong gradients reported
    bf16: int = 1  # 1: bf16 arithmetic on fp32 weights, as is usual on a GPU; 0: all in fp32
    threads: int = torch.get_num_threads()  # CPU threads; a run repeats exactly on as many
    prompts_per_step: int = 64  # P, questions per rollout, section 3.1 (paper: 512)
    group_size: int = 16  # G, fresh answers per question (paper: 16)
    max_new_tokens: int = 400  # longest answer in tokens (paper: 3072)
    temperature: float = 1.0  # of training and evaluation (paper: 1.0)
    top_p: float = 1.0  # nucleus of training and evaluation (paper: 1.0); the loss ignores it
    sample_rows: int = 512  # answers sampled at once, a question's together; fewer: less memory
    steps: int = 48  # rollouts, section 4.1, each with prompts_per_step / minibatch_prompts updates
    minibatch_prompts: int = 16  # questions per update; a group is never split (paper: 64)
    learning_rate: float = 2e-6  # of AdamW, constant after its warm-up (paper: 1e-6)
    lr_warmup_steps: int = 10  # steps in which --learning_rate is reached (paper: 10)
    clip_low: float = 0.2  # epsilon below a ratio of 1, Eq. 3 (paper: 0.2)
    clip_high: float = 0.28  # epsilon above a ratio of 1, Eq. 3 (paper: 0.28)
    dual_clip: float = 10.0  # largest ratio that counts where the advantage is negative; 0: off
    overlong_buffer: int = 0  # tokens before the limit that are penalised; 0: off (paper: 512)
    micro_tokens: int = 2048  # tokens per backward pass, a prompt counted once; bounds memory
    save_every: int = 8  # steps from checkpoint to checkpoint
    replays: int = 2  # M, replayed answers per group, section 3.2 (paper: 2)
    collect_k: int = 16  # answers per question in collection (authors: 64)
    collect_temperature: float = 0.7  # of collection (authors: 0.7)
    collect_top_p: float = 0.95  # nucleus of collection (authors: 0.95)
    eval_every: int = 8  # steps from evaluation to evaluation
    k: int = 4  # answers per held-out question (paper: 32)
    base_steps: int = 450  # supervised steps that make the tiny base model


# The defaults without --model: those of the tiny model on the embedded problems.
EMBEDDED = {"train_size": 512, "bf16": 0, "prompts_per_step": 32, "minibatch_prompts": 4,
            "max_new_tokens": 52, "steps": 24, "learning_rate": 1e-4, "lr_warmup_steps": 1,
            "save_every": 1, "collect_k": 32, "eval_every": 3}


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer."""
    question: str
    gold: str
    chat: tuple[tuple[str, str], ...] = ()  # (role, text) messages before the question

    @property
    def key(self):
        return self.question, self.chat  # identifies a problem in pool, seeds and data files


@dataclass
class Answer:
    """One answer, fresh or replayed. A group is a list of the answers to one question."""
    prompt: list[int]  # token ids
    response: list[int]  # token ids, with the end token where it was reached
    replayed: bool = False
    correct: bool = False
    reward: float = 0.0
    advantage: float = 0.0  # Eq. 5: one number for all its tokens
    old_logprobs: Tensor | None = None  # (t,) log pi_old; None where the advantage is 0


# ---- The equations -------------------------------------------------------------------------------
def overlong_penalty(length: int, limit: int, buffer: int, factor: float = 1.0) -> float:
    """0 up to limit - buffer tokens, then linearly down to -factor at the limit (authors' code)."""
    return min(0.0, (limit - buffer - length) / buffer * factor) if buffer else 0.0


def group_advantages(rewards: Tensor, group_ids: Tensor, eps: float = 1e-6) -> Tensor:
    """Eq. 1, and with replayed answers in the groups Eq. 5: (r - mean) / (std + eps) in each group.
    rewards (n,) floats, group_ids (n,) ints -> advantages (n,). The std is the unbiased one. Equal
    rewards get exactly 0; only a group of one has mean 0 and std 1. Why replay works: 16 failures
    (-1) beside 2 replays (+1) get -0.34 and +2.75; 16 failures alone would teach nothing."""
    advantages = torch.zeros_like(rewards)
    for group in group_ids.unique():
        members = group_ids == group
        reward = rewards[members]
        if len(reward) == 1:
            advantages[members] = reward / (1 + eps)
        elif (reward != reward[0]).any():  # equal ones keep 0, not rounding errors over eps
            advantages[members] = (reward - reward.mean()) / (reward.std() + eps)
    return advantages


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 10.0,
                num_tokens: int | None = None):
    """Eq. 3 and 4 as a loss: minus the token mean of min(ratio A, clip(ratio, 1-low, 1+high) A).
    logprobs, old_logprobs, mask (n, t), the mask 0/1 of any dtype; advantages (n,), one per answer.
    dual_clip (authors' code; 0 or None: off) keeps the objective above dual_clip A where A < 0.
    num_tokens: the divisor; with a mini-batch's own, the losses of its micro-batches add up to its.
    Returns the loss and the shares of tokens clipped below (A < 0) and above (A > 0). A replayed
    answer's old log-probs are not those of the policy that wrote it but of the policy at the start
    of the step, as in the authors' code: replay is imitation, weighted by A."""
    mask, advantages = mask.bool(), advantages[:, None]  # (n, t), (n, 1): one for all its tokens
    num_tokens = num_tokens or int(mask.sum())
    # Padding may hold anything, and exp of it may be inf, which times mask 0 would still be NaN.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.clamp(-20, 20).exp()  # (n, t), pi_theta / pi_old; bounds as in verl
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    if dual_clip:
        # min() sets no bound where a token of a bad answer has become likelier; this does.
        floor = torch.where(advantages < 0, dual_clip * advantages, -math.inf)
        objective = torch.maximum(objective, floor)
    is_clipped = mask & (clipped < unclipped)  # here the clipped term counts, and the gradient is 0
    stats = {"clip_low": (is_clipped & (advantages < 0)).sum().item() / num_tokens,
             "clip_high": (is_clipped & (advantages > 0)).sum().item() / num_tokens}
    return -(objective * mask).sum() / num_tokens, stats


# ---- Reward and experience pool (section 3.2) ----------------------------------------------------
def score(problem, text):
    """The reward of a text: +1 if right, else -1. Your own goes here; above 0 counts as right."""
    return 1.0 if verify(text, problem.gold, problem.question) else -1.0


class ExperiencePool:
    """Verified answers by question, duplicates kept; on disk in the authors' row format."""

    def __init__(self):
        self.entries = {}  # {problem.key: (problem, list of texts)}

    def __len__(self):
        return sum(len(texts) for _, texts in self.entries.values())

    def texts_of(self, problem):
        """The list of a problem's answers; a new, empty one where there is none."""
        return self.entries.setdefault(problem.key, (problem, []))[1]

    def add(self, question: str, gold: str, response: str, chat: tuple = ()) -> bool:
        """Keeps a response (text without end token) if it is correct; returns whether it is."""
        problem = Problem(question, gold, chat)
        if score(problem, response) <= 0:
            return False
        self.texts_of(problem).append(response)
        return True

    def draw(self, question: str, m: int, rng: random.Random, chat: tuple = ()) -> list[str]:
        """Up to m of a question's answers, at random, without replacement."""
        _, texts = self.entries.get((question, chat), (None, []))
        return rng.sample(texts, min(m, len(texts)))

    def save(self, path):
        """Writes the pool, whole or not at all. Raises UserError."""
        rows = []
        for problem, texts in self.entries.values():
            verified = {"ground_truth": problem.gold, "style": "rule", "candidates": texts}
            rows.append({"data_source": "math_dapo", "prompt": messages(problem),
                         "reward_model": verified, "extra_info": {"index": len(rows)}})
        write_rows(path, rows)

    @classmethod
    def load(cls, path):
        """Reads a pool, ours or the authors', and verifies every answer again. Raises UserError."""
        pool = cls()
        for where, row in read_rows(path):
            problem = row_to_problem(row, where)
            verified = row.get("reward_model")
            texts = verified.get("candidates") if isinstance(verified, dict) else None
            require(isinstance(texts, list), f"{where}: reward_model.candidates must be a list")
            for text in texts:
                pool.add(problem.question, problem.gold, str(text), problem.chat)
        return pool


# ---- The training step ---------------------------------------------------------------------------
def train_step(policy, optimizer, problems, pool, config, step):
    """One rollout and its updates: RLEP with a pool, else vanilla RL. Returns the metrics."""
    start = time.perf_counter()
    # 1. A group for each of P questions: G fresh answers, up to M replayed ones, their rewards.
    groups = make_groups(policy, problems, pool, config, step)
    sampled = time.perf_counter()
    # 2. One baseline for all answers of a group, fresh and replayed (Eq. 5).
    answers = sum(groups, [])
    group_ids = torch.tensor([i for i, group in enumerate(groups) for _ in group])  # (n,)
    advantages = group_advantages(torch.tensor([a.reward for a in answers]), group_ids)  # (n,)
    for answer, advantage in zip(answers, advantages.tolist()):
        answer.advantage = advantage
    # 3. Old log-probs before any update, of replays too, in the micro-batches of the update below.
    starts = range(0, len(groups), config.minibatch_prompts)
    mini_batches = [sum(groups[i:i + config.minibatch_prompts], []) for i in starts]
    for mini_batch in mini_batches:
        for micro_batch in micro_batches(mini_batch, config.micro_tokens):
            with torch.no_grad():
                logprobs, _ = policy.logprobs(micro_batch, config.temperature)  # (n, t)
            for answer, row in zip(micro_batch, logprobs):
                answer.old_logprobs = row[:len(answer.response)].clone()
    # 4. One update for each mini-batch of whole groups (Eq. 4); the first ratios are exactly 1.
    rate = config.learning_rate * min(1.0, step / config.lr_warmup_steps)
    updates = [update_policy(policy, optimizer, batch, config, rate) for batch in mini_batches]
    if lost := sum(update["skipped"] for update in updates):
        print(f"{lost} of {len(updates)} updates skipped: gradients not finite; try --bf16 0")
    seconds = {"sample_s": sampled - start, "update_s": time.perf_counter() - sampled}
    metrics = metrics_of(policy, groups, updates) | seconds
    print(f"step {step} of {config.steps}: accuracy {metrics['accuracy']:.1%}, without gradient "
          f"{metrics['zero_variance']:.0%} of groups, cut {metrics['truncated']:.0%}")
    return metrics


def make_groups(policy, problems, pool, config, step):
    """A group per question: G fresh answers and up to M replayed ones (section 3.2)."""
    groups = []
    for problem, responses in policy.sample(problems, config.group_size, config, "rollout", step):
        prompt = policy.encode_prompt(problem)
        group = [Answer(prompt, response) for response in responses]
        rng = random.Random(seed_of(config.seed, "replay", step, problem.key))
        for text in pool.draw(problem.question, config.replays, rng, problem.chat):
            response = policy.encode_answer(problem, text)
            if len(response) <= config.max_new_tokens:
                group.append(Answer(prompt, response, replayed=True))
        for answer in group:
            reward = score(problem, policy.decode(answer.response))
            answer.correct = reward > 0
            answer.reward = reward + overlong_penalty(
                len(answer.response), config.max_new_tokens, config.overlong_buffer)
        groups.append(group)
    return groups


def update_policy(policy, optimizer, answers, config, rate):
    """One optimizer step on a mini-batch (Eq. 4), none if all advantages are 0. Returns metrics."""
    num_tokens = sum(len(answer.response) for answer in answers)  # with those of advantage 0
    metrics = {"loss": 0.0, "clip_low": 0.0, "clip_high": 0.0}  # sums over micro-batches
    for micro_batch in micro_batches(answers, config.micro_tokens):
        logprobs, mask = policy.logprobs(micro_batch, config.temperature)  # (n, t)
        old_logprobs = pad_sequence([a.old_logprobs for a in micro_batch], batch_first=True)
        advantages = torch.tensor([a.advantage for a in micro_batch], device=mask.device)  # (n,)
        loss, stats = policy_loss(logprobs, old_logprobs, advantages, mask, config.clip_low,
                                  config.clip_high, config.dual_clip, num_tokens)
        loss.backward()  # gradients of micro-batches add up to that of the mini-batch
        for name, value in [("loss", loss.item()), *stats.items()]:
            metrics[name] += value
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0).item()  # paper: 1.0
    if not math.isfinite(norm + metrics["loss"]):  # skipped: a step along NaN would end the run
        optimizer.zero_grad()
        return {"skipped": 1}
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()  # if all advantages are 0, no weight has a gradient, and AdamW moves none
    optimizer.zero_grad()
    return metrics | {"grad_norm": norm, "skipped": 0}


def metrics_of(policy, groups, updates):
    """The figures of a step's answers and updates, for metrics.jsonl; the README explains each."""
    answers = sum(groups, [])
    fresh = [answer for answer in answers if not answer.replayed]
    teaching = [group for group in groups if any(answer.advantage for answer in group)]
    # Entropy, estimated: the mean -log pi of fresh tokens; those of advantage 0 are not computed.
    surprise = [-answer.old_logprobs for answer in fresh if answer.advantage]
    metrics = {
        "accuracy": fmean(answer.correct for answer in fresh),
        "reward": fmean(answer.reward for answer in fresh),
        "entropy": torch.cat(surprise).mean().item() if surprise else None,
        "length": fmean(len(answer.response) for answer in fresh),
        "truncated": fmean(answer.response[-1] not in policy.ends for answer in fresh),
        "replays": len(answers) - len(fresh),
        "zero_variance": 1 - len(teaching) / len(groups),
        "sampled_tokens": sum(len(answer.response) for answer in fresh),
        "trained_tokens": sum(len(answer.response) for answer in answers if answer.advantage),
        "skipped": fmean(update["skipped"] for update in updates),
    }
    finite = [update for update in updates if not update["skipped"]]
    for name in ("loss", "clip_low", "clip_high", "grad_norm"):
        metrics[name] = fmean(update[name] for update in finite) if finite else None
    return metrics


# ---- The phases ----------------------------------------------------------------------------------
def train(config, problems, held_out):
    """One arm from the base model: RLEP with --pool, else vanilla RL. Returns its summary."""
    out, fixed = Path(config.out), (["replays"] if config.pool else [])  # may not change later
    summary = open_folder("train", config, problems + held_out, fixed)
    if summary.get("step", -1) >= config.steps and (out / "policy").exists():
        return summary
    config = replace(config, model=config.model or make_base(config, out / "base"))
    policy = Policy(config, problems + held_out)
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.1)  # paper: 0.1
    pool = ExperiencePool.load(config.pool) if config.pool else ExperiencePool()
    require(not config.pool or any(map(pool.texts_of, problems)), f"{config.pool}: fits no problem")
    arm = f"RLEP, M = {config.replays}" if config.pool else "vanilla RL"
    print(f"{arm}: {policy.name} on {config.device}, bf16 {config.bf16}, {config.threads} threads")
    # Go on where the last checkpoint was written. Random numbers have no state: see seed_of.
    rows, checkpoint = [], out / "checkpoint.pt"  # rows: the metrics of the steps so far
    if checkpoint.exists():
        with blame(f"{checkpoint}: cannot be loaded"):
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            policy.model.load_state_dict(state.pop("model"))  # pop frees its memory
            optimizer.load_state_dict(state.pop("adam"))
            rows += state["rows"]
    require(len(rows) <= config.steps + 1, f"{out}: has more steps already; give more --steps")
    for step in range(len(rows), config.steps + 1):  # rows[i] is of step i; 0 only evaluates
        row, last = {"step": step}, step == config.steps
        if step > 0:
            questions = questions_of_step(problems, config, step)
            row |= train_step(policy, optimizer, questions, pool, config, step)
        if step % config.eval_every == 0 or last:
            row |= evaluate(policy, held_out, config, f"{arm}, step {step}", step)
        rows.append(row)
        write_rows(out / "metrics.jsonl", rows)
        if step % config.save_every == 0 or last:
            weights, adam = policy.model.state_dict(), optimizer.state_dict()
            with written_whole(checkpoint) as unfinished:
                torch.save({"rows": rows, "model": weights, "adam": adam}, unfinished)
    policy.save(out / "policy")
    curve = [[row["step"], row["mean_at_k"]] for row in rows if "mean_at_k" in row]
    write_rows(out / "summary.json", [rows[-1] | {"arm": arm, "seed": config.seed, "curve": curve}])
    return saved_row(out / "summary.json")


def questions_of_step(problems, config, step):
    """P questions, the same in both arms. Each epoch has a new order; its remainder is not used."""
    number = min(config.prompts_per_step, len(problems))
    epoch, place = divmod(step - 1, len(problems) // number)
    rng = random.Random(seed_of(config.seed, "order", epoch))
    return rng.sample(problems, len(problems))[place * number:(place + 1) * number]


def collect(config, problems):
    """Section 3.2: collect_k answers of --model to each question. Correct ones that are not cut off
    go into OUT/pool.jsonl if their question has two or more of them. Returns the summary."""
    fixed = ["collect_k", "collect_temperature", "collect_top_p"]
    out, summary = Path(config.out), open_folder("collect", config, problems, fixed)
    if summary and (out / "pool.jsonl").exists():
        return summary
    policy = Policy(config, problems)
    settings = replace(config, temperature=config.collect_temperature, top_p=config.collect_top_p)
    pool = ExperiencePool()
    for first in range(0, len(problems), config.prompts_per_step):
        batch = problems[first:first + config.prompts_per_step]
        for problem, responses in policy.sample(batch, config.collect_k, settings, "collection"):
            for response in responses:
                if response[-1] in policy.ends:  # else it is cut
                    pool.add(problem.question, problem.gold, policy.decode(response), problem.chat)
        print(f"collection: {first + len(batch)} of {len(problems)} questions, {len(pool)} answers")
    pool.entries = {key: entry for key, entry in pool.entries.items() if len(entry[1]) >= 2}
    require(pool.entries, f"{out}: no question is solved twice; raise --collect_k")
    pool.save(out / "pool.jsonl")
    write_rows(out / "summary.json", [{"questions": len(pool.entries), "answers": len(pool)}])
    return saved_row(out / "summary.json")


def run(config, problems, held_out):
    """The whole method: base model, vanilla RL, collection, RLEP from the base; a picture."""
    out = Path(config.out)
    # Once the collection has begun, --steps is fixed: the pool is by the policy of the last step.
    fixed = ["steps"] if (out / "collection").exists() else []
    open_folder("run", config, problems + held_out, fixed)
    config = replace(config, model=config.model or make_base(config, out / "base"))
    vanilla = train(replace(config, out=f"{out}/vanilla"), problems, held_out)
    settings = replace(config, out=f"{out}/collection", model=f"{out}/vanilla/policy")
    collected = collect(settings, problems)
    shutil.copy(out / "collection/pool.jsonl", out)
    rlep = train(replace(config, out=f"{out}/rlep", pool=f"{out}/pool.jsonl"), problems, held_out)
    write_rows(out / "summary.json", [{**collected, "vanilla": vanilla, "rlep": rlep}])
    from matplotlib.figure import Figure  # here, since nothing else needs it
    axis = Figure(figsize=(8, 4), layout="constrained").subplots()
    for arm in (vanilla, rlep):
        steps, shares = zip(*arm["curve"])
        axis.plot(steps, [100 * share for share in shares], ".-", label=arm["arm"])
    axis.set(title=config.data or "sums of products", xlabel="step", ylabel="held-out mean@k, %")
    axis.legend()
    axis.figure.savefig(out / "curves.png", dpi=120)


# ---- How a step is computed: sampling, log-probabilities, the policy -----------------------------
@torch.inference_mode()
def rollout(model, prompts: list[list[int]], group_size: int, *, max_new_tokens: int,
            temperature: float = 1.0, top_p: float = 1.0, eos_token_id: int | list[int],
            pad_token_id: int, seeds: list[int] | None = None):
    """Samples group_size answers to each of P prompts, all as token ids: a list of P lists of
    group_size lists, with the end token where it was reached. seeds: one per prompt, else torch's.
    Number [t, i] of a seed decides token t of answer i. Calls read_prompts and sample_tokens."""
    # 1. Read each prompt once, all but its last token. Row i is then an answer to prompt owner[i].
    owner = torch.arange(len(prompts), device=model.device).repeat_interleave(group_size)  # (n,)
    width = max(2, *map(len, prompts)) - 1  # columns that the longest prompt takes
    cache = Cache(layer_class_to_replicate=lambda: StaticLayer(width))  # step 3 adds columns
    seen = read_prompts(model, prompts, owner, cache)  # (n, columns): which hold a token
    token = torch.tensor([prompt[-1] for prompt in prompts], device=model.device)[owner]  # (n,)
    # 2. Random numbers, drawn on the CPU: a question has its own, whatever the batch and device.
    seeds = seeds or torch.randint(2**62, (len(prompts),)).tolist()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniform = [torch.rand(max_new_tokens, group_size, generator=each) for each in generators]
    uniform = torch.cat(uniform, dim=1).to(model.device)  # (max_new_tokens, n)
    # 3. Each pass reads a token of every answer, first its prompt's last one, and draws the next.
    ends = torch.tensor(eos_token_id, device=model.device).flatten()
    sampled = token.new_full((len(token), max_new_tokens), pad_token_id)  # (n, max_new_tokens)
    rows = torch.arange(len(token), device=model.device)  # of sampled: answers still going on
    for t in range(max_new_tokens):
        if t % 8 == 0:  # drop ended answers, make room; seldom, as it copies and waits for a GPU
            keep = (~torch.isin(sampled[rows, :t], ends).any(1)).nonzero()[:, 0]
            if len(keep) == 0:
                break
            rows, token, seen = rows[keep], token[keep], pad(seen[keep], (0, 8))
            for layer in cache.layers:  # (rows, heads, columns, head size)
                layer.keys = pad(layer.keys[keep], (0, 0, 0, 8))
                layer.values = pad(layer.values[keep], (0, 0, 0, 8))
                layer.max_cache_len += 8
        seen[:, width + t] = True
        logits = model(token[:, None], attention_mask=seen, past_key_values=cache,
                       position_ids=seen.sum(1, keepdim=True) - 1).logits[:, -1]  # (rows, V)
        token = sample_tokens(logits, uniform[t, rows], temperature, top_p)  # (rows,)
        sampled[rows, t] = token
    # 4. Cut each answer after its first end token.
    stops = (torch.isin(sampled, ends).cumsum(1) == 0).sum(1).tolist()  # tokens before it
    answers = [tokens[:stop + 1] for tokens, stop in zip(sampled.tolist(), stops)]
    return [answers[first:first + group_size] for first in range(0, len(answers), group_size)]


def read_prompts(model, prompts: list[list[int]], owner: Tensor, cache):
    """Runs P prompts, but for their last tokens, through the model: once a rollout, and once in
    each response_logprobs. Fills the key-value cache: row i is for an answer to prompt owner[i],
    owner (n,). Returns seen (n, width), which columns hold a token, as padding is on the left."""
    width = max(2, *map(len, prompts)) - 1  # never 0: no model takes an empty row
    ids = torch.zeros(len(prompts), width, dtype=torch.long)  # (P, width)
    seen = torch.zeros(len(prompts), width, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        start = width - (len(prompt) - 1)
        ids[i, start:] = torch.tensor(prompt[:-1])
        seen[i, start:] = True
    ids, seen = ids.to(model.device), seen.to(model.device)
    position = (seen.cumsum(1) - 1).clamp(min=0)  # (P, width): 0 for a prompt's first token
    model.base_model(ids, attention_mask=seen, position_ids=position, past_key_values=cache)
    for layer in cache.layers:  # (P, heads, columns, head size) -> (n, heads, columns, head size)
        layer.keys, layer.values = layer.keys[owner], layer.values[owner]
    return seen[owner]


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float):
    """logits (rows, V) -> tokens (rows,): the best ones at temperature 0, else where the uniform
    numbers (rows,) in [0, 1) fall in the cumulative distributions of their rows. One number a row:
    torch.multinomial would make an answer depend on others in the batch."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, -1)  # (rows, V)
    if top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        ordered.masked_fill_(ordered.cumsum(-1) - ordered >= top_p, 0)  # fewest to reach top_p stay
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
    cumulative = probs.cumsum(-1)
    # 1 - uniform is above 0, so that a token of probability 0 is never drawn.
    target = (1 - uniform[:, None]) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target)[:, 0].clamp(max=probs.shape[-1] - 1)  # V if NaN


def response_logprobs(model, prompts: list[list[int]], responses: list[list[int]], *,
                      temperature: float = 1.0):
    """log pi_theta of every response token: n prompts, n responses -> logprobs (n, t), mask (n, t).
    Each distinct prompt is read once. Logits must be the output embedding of the last hidden state
    (see check_model); no gradient checkpointing, which drops the cache. Calls read_prompts."""
    distinct = list(dict.fromkeys(map(tuple, prompts)))  # P prompts
    owner = torch.tensor([distinct.index(tuple(prompt)) for prompt in prompts], device=model.device)
    cache = DynamicCache()
    seen = read_prompts(model, distinct, owner, cache)  # (n, width)
    # Inputs: a prompt's last token and the response but its last token; targets: the response.
    rows = [torch.tensor([prompt[-1], *answer]) for prompt, answer in zip(prompts, responses)]
    rows = pad_sequence(rows, batch_first=True).to(model.device)  # (n, 1 + t), padded on the right
    inputs, targets = rows[:, :-1], rows[:, 1:]  # (n, t)
    columns = torch.arange(inputs.shape[1], device=model.device)  # (t,), of inputs and of targets
    mask = columns < torch.tensor([[len(answer)] for answer in responses], device=model.device)
    hidden = model.base_model(
        inputs, attention_mask=torch.cat([seen, mask], dim=1),  # the model adds the causal one
        position_ids=seen.sum(1, keepdim=True) + columns, past_key_values=cache,
    ).last_hidden_state  # (n, t, d)
    logits = model.get_output_embeddings()(hidden[mask]).float() / temperature  # (tokens, V)
    logprobs = logits.gather(1, targets[mask][:, None])[:, 0] - logits.logsumexp(1)  # (tokens,)
    return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs), mask


def micro_batches(answers, micro_tokens):
    """Lists of at most micro_tokens tokens, padding included; one answer alone may have more.
    Answers of advantage 0 have no gradient and are left out."""
    batches, teaching = [], [answer for answer in answers if answer.advantage != 0]
    # Sorted by length, to a power of 2, then by prompt: little padding, few prompts in a batch.
    teaching.sort(key=lambda a: (len(a.response).bit_length(), len(a.prompt), a.prompt))
    for answer in teaching:
        grown = [*batches[-1], answer] if batches else [answer]
        prompts = {tuple(a.prompt) for a in grown}  # each is read once
        tokens = len(prompts) * max(map(len, prompts))
        tokens += len(grown) * max(len(a.response) for a in grown)
        if batches and tokens <= micro_tokens:
            batches[-1] = grown
        else:
            batches.append([answer])
    return batches


class Policy:
    """A causal language model with its tokenizer. Weights are fp32, as bf16 would round small
    updates away. With --bf16 1 passes are in bf16 (torch.autocast), and a bf16 copy samples, fast.
    Raises UserError if it cannot be loaded or trained correctly."""

    def __init__(self, config, problems):
        # cuDNN's attention gave NaN gradients on H100 (pytorch 196678), wrong samples on B200.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.name = f"--model {config.model}"
        fault = "cannot be loaded" if os.path.exists(config.model) else "no such folder or hub id"
        with blame(f"{self.name}, --device, --chat_template_kwargs: {fault}"):
            self.kwargs = {**json.loads(config.chat_template_kwargs)}  # raises if it is no object
            self.tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
            self.model, loading = AutoModelForCausalLM.from_pretrained(
                config.model, trust_remote_code=False, dtype=torch.float32,
                attn_implementation="sdpa", output_loading_info=True)
            self.model.to(config.device).eval()  # eval: with dropout, no ratio would ever be 1
        self.tokenizer.chat_template = self.tokenizer.chat_template or PLAIN_TEMPLATE
        end, stops = self.find_end(), self.model.generation_config.eos_token_id  # int, list or None
        require(end is not None, f"{self.name}: no end token; give its tokenizer an eos_token")
        self.ends = [end, *(stops if isinstance(stops, list) else {stops} - {None})]  # end first
        self.sampler = copy.deepcopy(self.model) if config.bf16 else self.model
        self.autocast = torch.autocast(self.model.device.type, torch.bfloat16, config.bf16 > 0)
        self.update_sampler()
        check_model(self, loading, problems, config.max_new_tokens)

    def find_end(self):
        """The token that ends the assistant's turn in the chat template, else eos. They may differ:
        Qwen's base models have <|endoftext|> as eos, and end a turn with <|im_end|>."""
        chat = messages(Problem("1", "")) + [{"role": "assistant", "content": "ANSWER"}]
        _, shown, end = self.apply_template(chat).rpartition("ANSWER")  # shown: "" if not found
        for token in self.tokenizer(end, add_special_tokens=False).input_ids:
            added = self.tokenizer.added_tokens_decoder.get(token)
            if shown and added and added.special and token != self.tokenizer.unk_token_id:
                return token
        return self.tokenizer.eos_token_id

    def apply_template(self, chat, **more):
        """The text of a chat. Raises UserError if the template refuses it."""
        with blame(f"{self.name}: fix its chat template, or give --chat_template_kwargs"):
            return self.tokenizer.apply_chat_template(chat, tokenize=False, **more, **self.kwargs)

    def encode_prompt(self, problem, text=""):
        """Token ids of a prompt, and of a text after it."""
        prompt = self.apply_template(messages(problem), add_generation_prompt=True)
        return self.tokenizer(prompt + text, add_special_tokens=False).input_ids

    def encode_answer(self, problem, text):
        """Token ids of a text as a response: as they are after the prompt, with the end token."""
        prompt, ids = self.encode_prompt(problem), self.encode_prompt(problem, text)
        if ids[:len(prompt)] != prompt:  # a token reaches across the border
            ids = prompt + self.tokenizer(text, add_special_tokens=False).input_ids
        return [token for token in ids[len(prompt):] if token not in self.ends] + self.ends[:1]

    def decode(self, response):
        """The text of a response: without its end token, with other special ones, as <think>."""
        tokens = self.ends[:1] + [token for token in response if token not in self.ends]
        text = self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text.removeprefix(self.tokenizer.decode(self.ends[:1]))  # alone, loses a first space

    def update_sampler(self):
        """Gives the bf16 copy the present weights. Without one, sampler and model are the same."""
        for mine, trained in zip(self.sampler.parameters(), self.model.parameters()):
            if mine is not trained:
                mine.data = trained.data.bfloat16()  # buffers, the rotary angles, stay fp32

    def sample(self, problems, k, config, *purpose):
        """Yields (problem, k responses), as config says. purpose ("rollout", step) seeds them."""
        self.update_sampler()
        at_once = max(1, config.sample_rows // k)  # questions
        for first in range(0, len(problems), at_once):
            batch = problems[first:first + at_once]
            prompts = [self.encode_prompt(problem) for problem in batch]
            seeds = [seed_of(config.seed, *purpose, problem.key) for problem in batch]
            groups = rollout(self.sampler, prompts, k, max_new_tokens=config.max_new_tokens,
                             temperature=config.temperature, top_p=config.top_p, seeds=seeds,
                             eos_token_id=self.ends, pad_token_id=self.ends[0])
            yield from zip(batch, groups)

    def logprobs(self, answers, temperature):
        """response_logprobs of answers (n, t) with its mask, in the arithmetic of the update."""
        prompts, responses = [a.prompt for a in answers], [a.response for a in answers]
        with self.autocast:
            return response_logprobs(self.model, prompts, responses, temperature=temperature)

    def save(self, folder):
        """Writes an ordinary Hugging Face folder, whole or not at all. Raises UserError."""
        with written_whole(folder) as unfinished:
            self.model.save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)


def seed_of(*parts):
    """A number that depends on all parts, as (seed, "rollout", step, key): no state is kept."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


# ---- Evaluation ----------------------------------------------------------------------------------
def mean_at_k(correct: list[list[bool]]):
    """The mean share of correct answers."""
    return fmean(fmean(row) for row in correct)


def pass_at_k(correct: list[list[bool]], k: int):
    """The chance that at least one of k is correct: 1 - C(n - c, k) / C(n, k), c of n correct."""
    n = len(correct[0])
    return 1 - fmean(math.comb(n - sum(row), k) / math.comb(n, k) for row in correct)


def evaluate(policy, problems, config, title, step=None):
    """k answers to each problem, with the same seeds each time; with a step, OUT keeps them all."""
    rows = []
    for problem, responses in policy.sample(problems, config.k, config, "evaluation"):
        texts = [policy.decode(response) for response in responses]
        rows.append({"step": step, "question": problem.question, "gold": problem.gold,
                     "texts": texts, "correct": [bool(score(problem, text) > 0) for text in texts]})
    correct = [row["correct"] for row in rows]
    mean, passed = mean_at_k(correct), pass_at_k(correct, config.k)
    print(f"{title}: mean@{config.k} {mean:.1%}, pass@{config.k} {passed:.1%}")
    print(f"    {rows[0]['question']!r} ({rows[0]['gold']}): {rows[0]['texts'][0][-300:]!r}")
    if step is not None:
        path = Path(config.out) / "answers.jsonl"
        before = [row for _, row in read_rows(path) if row["step"] < step] if step > 0 else []
        write_rows(path, before + rows)
    return {"mean_at_k": mean, "pass_at_k": passed}


# ==== Appendix: what every such program needs. Data files =========================================
def read_rows(path):
    """Yields ("FILE:LINE", row) for the JSON lines of a file. Raises UserError on a bad one."""
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if line.strip():
            with blame(f"{path}:{number}: each line must be a JSON object, as in pandas' to_json"):
                yield f"{path}:{number}", {**json.loads(line)}


def messages(problem):
    """A problem as chat messages, the question last."""
    chat = [*problem.chat, ("user", problem.question)]
    return [{"role": role, "content": text} for role, text in chat]


def row_to_problem(row, where):
    """Reads GSM8K, MATH, DAPO, AIME, AMC, RLEP rows. Yours goes here. Raises UserError."""
    question = row.get("prompt") or row.get("question") or row.get("problem")
    if isinstance(question, str):
        question = [{"role": "user", "content": f"{question.strip()}\n{BOXED}"}]
    with blame(f"{where}: no question; give question, problem or prompt: a text, or a chat list"):
        *chat, (role, text) = [(message["role"], "" + message["content"]) for message in question]
    require(role == "user" and text.strip(), f"{where}: the last message must be the user's")
    inner = row["reward_model"] if isinstance(row.get("reward_model"), dict) else {}
    golds = [extract_answer(str(row.get("solution")))]  # MATH
    for value in (inner.get("ground_truth"), row.get("ground_truth"), row.get("answer")):
        if type(value) in (str, int) or isinstance(value, float) and math.isfinite(value):
            last = str(value).rpartition("####")[2].strip()  # GSM8K
            golds.append(extract_answer(last) or last)
    golds = [gold for gold in golds if gold]
    require(golds, f"{where}: no answer; give answer or ground_truth, or a solution with a box")
    return Problem(text, golds[-1], tuple(chat))


def load_problems(config):
    """The training problems and the held-out ones; of duplicates the first. Raises UserError."""
    def load(path):
        found = [row_to_problem(row, where) for where, row in read_rows(path)]
        require(found, f"{path}: no problems")
        first = {problem.key: problem for problem in reversed(found)}  # of equal keys
        return [problem for problem in found if problem is first[problem.key]]
    size, used = config.eval_size, config.train_size
    problems = load(config.data) if config.data else embedded_problems(used + size, seed=0)
    others = load(config.eval_data) if config.eval_data else problems
    held_out = {problem.key: problem for problem in others[:size]}
    rest = [problem for problem in problems if problem.key not in held_out]
    print(f"training on {len(rest[:used])} of {len(rest)}, held out {len(held_out)}/{len(others)}")
    return rest[:used], list(held_out.values())


# ---- The embedded problems and their base model: nothing to download -----------------------------
def embedded_problems(number, seed):
    """Sums of 2, 3 or 4 products modulo 10, in turn, such as "3*7+9*4 mod 10 = " with gold 7."""
    rng, problems = random.Random(seed), {}
    while len(problems) < min(number, 25_000):  # there are 10,000 sums of two products
        pairs = [(rng.randrange(10), rng.randrange(10)) for _ in range(2 + len(problems) % 3)]
        question = "+".join(f"{a}*{b}" for a, b in pairs) + " mod 10 = "
        problems[question] = Problem(question, str(sum(a * b for a, b in pairs) % 10))
    return list(problems.values())


def write_working(question, rng):
    """A working, as 3*7=1,9*4=6,1+6=7\\boxed{7}. A product of two digits above 4 is a guess, right
    one time in ten; of other results one in twenty is wrong."""
    def work(a, sign, b):
        slips = rng.random() < (0.9 if sign == "*" and min(a, b) > 4 else 0.05)
        result = (a * b if sign == "*" else a + b) + (rng.randrange(1, 10) if slips else 0)
        steps.append(f"{a}{sign}{b}={result % 10}")
        return result % 10
    steps, total = [], None
    for product in question.split(" ")[0].split("+"):
        value = work(int(product[0]), "*", int(product[2]))
        total = value if total is None else work(total, "+", value)
    return f"{','.join(steps)}\\boxed{{{total}}}"


def save_untrained(folder, seed):
    """Writes a Llama of 160,000 random weights and a tokenizer of characters and a few words."""
    words = ["<pad>", "<eos>", "<unk>", "\\boxed{", "Work: ", " mod 10 = ", *"0123456789+*=,}?"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    pieces = Regex(r"\\boxed\{|Work: | mod 10 = |[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        chat_template="{{ messages[-1]['content'] }}").save_pretrained(folder)
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.05, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 30.0})).save_pretrained(folder)


def make_base(config, folder):
    """The embedded base model's folder. It could solve many problems, but nearly always gives up:
    three examples in four teach to go on with a working, the fourth to begin one only rarely."""
    if (folder / "policy").exists():
        return str(folder / "policy")
    save_untrained(folder / "initial", seed_of(config.seed, "weights"))
    policy = Policy(replace(config, model=f"{folder}/initial"), embedded_problems(3, seed=0))
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.01)
    for step in tqdm(range(config.base_steps), "base model", disable=None):
        rng, answers = random.Random(seed_of(config.seed, "warm-up", step)), []
        for place, problem in enumerate(embedded_problems(32, seed=rng.getrandbits(48))):
            prompt = policy.encode_prompt(problem)
            begin = policy.encode_answer(problem, "Work: ")[:-1]
            if place % 4 > 0:
                working = policy.encode_answer(problem, write_working(problem.question, rng))
                answers.append(Answer(prompt + begin, working, advantage=1.0))
            else:  # both choices; the advantage is the weight of an example here
                share = {2: 1 / 8, 3: 1 / 32, 4: 1 / 128}[problem.question.count("*")]
                give_up = policy.encode_answer(problem, "\\boxed{?}")
                answers.append(Answer(prompt, begin, advantage=share))
                answers.append(Answer(prompt, give_up, advantage=1 - share))
        logprobs, mask = policy.logprobs(answers, temperature=1.0)  # (n, t)
        weights = torch.tensor([[answer.advantage] for answer in answers], device=mask.device)
        loss = -(weights * logprobs).sum() / mask.sum()  # supervised: minus the mean log-prob
        loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / config.base_steps)
        optimizer.step()
        optimizer.zero_grad()
    policy.save(folder / "policy")
    return str(folder / "policy")


# ---- The verifier --------------------------------------------------------------------------------
# \boxed{\frac{\sqrt{8}}{2}\text{ cm}} for the gold answer \sqrt2 is True; \boxed{6+0} for 6, False:
#   extract_answer: the last box    \frac{\sqrt{8}}{2}\text{ cm}  gold: \sqrt2  6+0   gold: 6
#   TIDY: one spelling of many      \frac{√{2}{8}}{2} cm         √{2}{2}      6+0        6
#   UNIT: off if one side has none  \frac{√{2}{8}}{2}            √{2}{2}      6+0        6
#   read: the value, after TO_DO    1.41421356237; one root      the same     one sum    none
LONGEST, LAST_PART, BESIDE = 300, 20_000, 80  # characters: of an answer; searched; looked at beside
MOST_DIGITS, LARGEST = 400, 1e15  # of a power; of a float: above, it is too coarse to compare
# Spellings of one thing: the rows of TIDY change answer, gold and question, one after the other
LITERALS = dict(pair.split("→") for pair in r"""
    \dfrac→\frac \tfrac→\frac \cfrac→\frac ½→\frac12 ¾→\frac34 \sqrt→√ sqrt(→√( \pi→π \infty→∞ \in→=
    \emptyset→∅ \varnothing→∅ \cup→, ;→, &→, \\→],[ \begin{pmatrix}→[[ \end{pmatrix}→]] \cdot→* ·→*
    \begin{bmatrix}→[[ \end{bmatrix}→]] \times→* ×→* **→^ \div→/ ÷→/ −→- –→- \pm→± \leq→≤ \le→≤ <=→≤
    \geq→≥ \ge→≥ >=→≥ ²→^2 ³→^3 ⁴→^4 ⁵→^5 ...→… ^\circ→~degree ^{\circ}→~degree °→~degree {:}→:
    \%→~percent %→~percent \{→{ \}→} $→ \(→ \)→ \[→ \]→ \angle→ \boxed→""".split())
LITERAL = "(?:" + "|".join(map(re.escape, LITERALS)) + r")(?!(?<=[A-Za-z])[A-Za-z])"  # whole words
BRACES = r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\})*)\}"  # five deep
TIDY = [(re.compile(pattern), new) for pattern, new in [
    (r"\\(?:left|right|[bB]igg?[lr]?|\w+style|large|(?:text)?color\{\w+\})(?![A-Za-z])", ""),
    (r"(?<=\d)(?:\{,\}|,\\! ?|\\[, ]|[\xa0\u2009\u202f])(?=\d{3}(?!\d))", ""),  # 12\,345: 12345
    (r"(?<![\d.,(\[])\d{1,3}(?:,\d{3})+(?![\d,)\]])", lambda m: m[0].replace(",", "")),  # 1,234
    (r"\\\$ ?([\d.]*\d)", r"\1~dollars"),  # \$45: 45 dollars
    (LITERAL, lambda found: LITERALS[found[0]]),  # \dfrac12: \frac12
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", "π"),
    (r"\\(?:text|math(?!bb)|mbox|underline)\w*\s*\{([^{}]*)\}", r" \1 "),  # \mathbf{(3,4)}: (3,4)
    (r"(?:~|\\[,;:]|\\q?quad|\\?\s)+", " "),  # a~b: a b
    (r"^\W*([A-J])[).:]+ +(?!.*\b(?:and|or|not|[a-j])\b)[^,(A-Z]*$", r"\1"),  # (C) 14: C
    (r"[, ]*\b(?:and|or)\b[, ]*(?=[^, ])", ","),  # 2, 3, and 5: 2,3,5
    (r"(?<=_)\{(\w+)\}|\{([A-Za-z])\}", r" \1\2 "),  # a_{10}: a_10, \sin{b}: \sin b
    (r"(?<![^,])([^,±]*)±([^,]*)", r"\1+\2,\1-\2"),  # 1±x: 1+x,1-x
    (r"√(?: ?\[([^\]]*)\])?", lambda found: f"√{{{found[1] or 2}}}"),  # √[3]8: √{3}8
    (r"(√\{\w+\}) ?(\d+)", r"\1{\2}"),  # √{3}8: √{3}{8}
    (rf"\\frac ?(?:{BRACES}|(\w)) ?(\w)", r"\\frac{\1\2}{\3}"),  # \frac123: \frac{1}{2}3
    (r"(?<![\w.^}])(\d+) ?(?=\\frac ?(?:\d|\{\d+\}) ?\{?\d)", r"\1&"),  # 2\frac12: 2&\frac12
    (r"(?<![A-Za-z\d)}\]π]) +| +(?![A-Za-z\d])|[ .,]+$", ""),  # a + b.: a+b
    (r"(?<![\d.])10\^(?:\{(-?\d+)\}|(-?\d+))(?![\d.^])", r"1e\1\2")]]  # 3*10^{8}: 3*1e8
# What may be missing on one side: a name, f(x)= or m=, and a unit, 5 cm, 6π cm^3 or 7 (apples)
NAME = re.compile(r"(?<![^,])(?:\([a-z,]+\)|(?:[^\W\d](?:_\w+)?|[A-Z]{2,3}|[a-z]{4,})(?:\(\w\))?)=")
COUNT = (r"(?:one|two|three|four|five|sixe|seven|eight|nine|ten|eleven|twelve|\w+teen|\w+tie|pair"
         r"|hal[fv]e?|third|quarter|(?!mo)\w+th|score|dozen|hundred|thousand|\w+llion|lakh)s?\b")
UNIT = re.compile(r"(?i)(?<=[\w)}\]])(?<![A-Za-z]{2})(?: | ?\()(?!" + COUNT + r")((?:[ckm]m|kg|ft|"
                  r"k?m/[sh]|hour|degree|percent|[a-z]+[^\Ws](?=s)))s?(\^\d)?\)?(?![^,)\]}])")
# Where the answer is: in \boxed{5}, \boxed 5 or \boxed{2}$ and $\boxed{5}; or from MARKER to END
BOX = r"\\f?box(?:ed)?\s*(?:" + BRACES + r"|(-?\d[\d.,]*|\\d?frac\{\w+\}\{\w+\})|\{)"
BOXES = rf"{BOX}(?:(?:[^\w,;.]|q?quad|text)*(?:[,;]|and|or)(?:[^\w.]|q?quad|text|and|or)*{BOX})*"
MARKER = (r"(?im)(?:answers?[\s*]*(?:is|are|[:=])(?! helpful)|^[#* ]*(?:final )?answer[*: ]*$|^A:"
          r"|<answer>|####(?= *(?:[^A-Za-z\s*]|\w\b)))(?:[\s*:`$]|\\[\[(])*")
END = r"(?<!\.)[.;](?!\S)|\n|</|[, ]+(?:because|since|which|so|in total|not)\b| \((\d+ )?[a-z]{2}"
# What makes the answer, ¦ in the text, one of several, or only a part of the value
OR = r"(?:[^.\n]|\.\d)*\b(?:or|if|otherwise|altern\w+|maybe|perhaps|possibly|also|might)\b"
SIGN = r"(?:[-+/−×·÷±]|(?<!\*)\*(?!\*)|\\(?:times|cdot|div|pm)\b)"
DOUBT = "(?i)" + "|".join([
    r"\d(?:[$,]|\\text\{)* or \W*¦|#### *[^\sA-Za-z]+ +¦",  # It is 5 or ¦; #### 17 #### ¦
    r"box(?:ed)? ?\{.*\}" + OR + r"[^.\n]*¦",  # \boxed{17} if n is even, else ¦
    "¦" + OR + r"|¦[^\w\n]*(?:or|maybe|perhaps) ",  # ¦ if n is even; ¦. Or it is 28
    r"(?:[-−+/^]|(?<!\\)[({]|\b(?:not|minus) )¦",  # -¦, 2^{¦, \sqrt{¦, \sin(¦
    r"[\w$)}] ?" + SIGN + r"[ $]*¦|[$([](?:[^$=,]*=)? ?[\w.]+¦",  # 5 - ¦, x = 3\cdot ¦, $x = 2¦
    r"¦[ $}]*(?:" + SIGN + r" ?(?:[\d\\({]|[a-z]\b)|(?:\\text\{ *)?(?:and a|" + COUNT + "))",
    r"¦(?!(?:[ })*]|\\\W)*(?:$|\n|[$<=&'\"。%°]|[.,;:](?! ?\d)|\^\W*circ|[ckm]m| (?:a |[A-Za-z]{2}|"
    r"[(–—-])|\\(?:text|math|q?quad|end|right|p?mod|[)\]])))"])  # ¦\pi, ¦00, ¦^2
# How a tidied text is read: 2x+1 has the tokens 2, x, +, 1. SIGNS: the higher, the closer it binds
TOKEN = re.compile(r"(?<!\^)[\d.]*\d\*1e-?\d{1,3}|[\d.]*\d(?:e[-+]?\d{1,3})?|no\b|on\b|\\[a-z]+"
                   r"|(?:[fghP]|ln|[a-z]{3,})\(|(?<![\w\\])[A-Za-z]{3}[A-Za-z ]*|[^\W\d_]_\w+|[^ ]")
TO_DO = re.compile(r"√|\^|(?<!\de)(?<=[\w)}\]])[-+]|-[({]*-|[\d)}]\*(?!1e)[\d(\\]|\)\("
                   r"|\d\(-?[\d.]+\)|(?<!√\{\d)\}(?:\(?\d|\\frac\{\d)")  # 6+0, 2(3), -(-6)
SIGNS = {"=": 1, "+": 2, "-": 2, "*": 3, "/": 3, "^": 4, "0-": 4, "0+": 4, "&": 5, "0/": 6, "0√": 6}
OPERATIONS = {"+": add, "-": sub, "*": mul, "/": truediv, "0-": sub, "0+": add, "&": add,
    "0/": truediv, "0√": lambda degree, base: base ** (1 / degree),
    "=": lambda left, right: made_up("=", abs(left - right)),
    "^": lambda a, b: a ** b if len(str(a)) * abs(b) < MOST_DIGITS else 1 / 0}  # too long: raises


def verify(response: str, gold: str, question: str = "") -> bool:
    """Returns whether the final answer of a response equals the gold one. Never raises.
    An answer that is still to be worked out, repeats the question or cannot be read is wrong."""
    try:
        texts = [extract_answer(response), (extract_answer(gold) or gold)[:LONGEST], question]
        for pattern, new in TIDY:
            texts = [pattern.sub(new, text) for text in texts]
        answer, gold, _ = texts  # without brackets, (x^2-25) and x^{2}-25 repeat x^2-25:
        bare, wanted, asked = [re.sub(r"\\frac|[{}()*]|\.0+\b|(?<=\.\d)0+\b", "",
                                      text.replace("}{", "/")) for text in texts]
        if bare in asked and bare != wanted and not re.fullmatch(r"\W*\w+\W*( \w+)?", bare):
            return False
        for label in (NAME, UNIT):  # may be missing on one side
            if len(set(label.findall(answer + "," + gold))) == 1:
                answer, gold = label.sub("", answer), label.sub("", gold)
        if answer == gold:
            return True
        finished = len(TO_DO.findall(answer)) <= len(TO_DO.findall(gold))
        value, wanted = [read(TOKEN.findall("{%s}" % text)[::-1]) for text in (answer, gold)]
        return finished and made_up(value) == made_up(wanted)
    except Exception:  # what cannot be read equals nothing
        return False


def extract_answer(response: str) -> str | None:
    """Returns the last box, or boxes joined by commas, else what "Answer:" or the like announces.
    None if there is none, it is hedged or its value goes on outside the box. Never raises."""
    text = response[-LAST_PART:].rpartition("</think>")[2]
    boxes = [*re.finditer(BOXES, text)]
    found = boxes or [*re.finditer(MARKER, text)] or [re.search(r"\Z", text)]
    start, end = found[-1].span()
    answer = ",".join(map("".join, re.findall(BOX, text[start:end])))
    if not boxes:
        answer = re.split(END, text[end:][:LONGEST])[0].rstrip(" *,")
        end += len(answer)
    beside = text[:start][-BESIDE:] + "¦" + text[end:][:BESIDE]
    usable = re.search(r"(?:[^\W_]|[∅∞]|\\[{e])(\\,|[^,])*$", answer) and len(answer) < LONGEST
    return answer if usable and not re.search(DOUBT, beside) else None


def read(tokens: list, weakest: int = 0):
    """The value of the next tokens, up to a sign that binds less than `weakest`; pop takes one."""
    token = tokens.pop()
    if token in "([{":
        items = [read(tokens, 1)]
        while (end := tokens.pop()) == ",":
            items.append(read(tokens, 1))
        items = sorted(items) if end == "}" else items  # a set has no order
        single = len(items) == 1 and end != "]"
        value = items[0] if single else made_up(token + end, *items)
    elif token in ("+", "-", "\\frac", "√"):  # -5 is 0-5; \frac goes between its two numbers
        value = Fraction(0) if token in "+-" else read(tokens, SIGNS["0/"])
        tokens.append("0" + token.replace("\\frac", "/"))
    elif token.strip(".")[:1].isdecimal():
        value = Fraction(token.replace("*1", ""))  # 3*1e8
    else:  # a name; anything else raises
        name = re.fullmatch(r"[∞∅]|[^\W\d_][\w ]*", token)[0]
        value = made_up(name if "_" in name or len(name) == 1 else name.lower())
    while tokens:
        if weakest <= SIGNS["*"] and re.match(r"[({\\√∞]|[^\W\d_]", tokens[-1]):
            tokens.append("*")  # 2x
        if SIGNS.get(tokens[-1], 0) < weakest:
            break
        sign = tokens.pop()  # one that is not in SIGNS raises: 5}6
        right = read(tokens, SIGNS[sign] + (sign in "+-*/"))  # 9-4-2 is (9-4)-2
        value = OPERATIONS[sign](value, right)
        whole = "/" in sign and value % 1 == 0  # 84/2 is still to be worked out
        if whole or isinstance(value, float) and abs(value) > LARGEST:
            raise ArithmeticError(sign)
    return value


def made_up(*parts):
    """A number that stands for a letter, or for a tuple: other parts, another number."""
    texts = [f"{part:.12g}, {part:.6f}" if isinstance(part, float) else str(part) for part in parts]
    digits = hashlib.shake_128(repr(texts).encode()).hexdigest(4)
    return 1 + Fraction(int(digits, 16), 2**32)


# ---- Models that would be trained wrongly are refused --------------------------------------------
@torch.no_grad()
def check_model(policy, loading, problems, max_new_tokens):
    """Refuses weights and prompts that do not fit, and a model of which greedy sampling or
    response_logprobs are not as in plain passes over the same texts. Raises UserError."""
    name, model, longest = policy.name, policy.model, 20
    wrong = loading["missing_keys"] | {key for key in loading["unexpected_keys"] if "scale" in key}
    wrong |= {key for key, weight in model.named_parameters()
              if weight.dtype != torch.float32 or not weight.requires_grad}
    require(not wrong, f"{name}: weights are missing, frozen or quantised: {sorted(wrong)[:3]}")
    settings = model.config.get_text_config()
    kinds = {*(getattr(settings, "layer_types", None) or [])}
    require(kinds <= {"full_attention", "sliding_attention"},
            f"{name}: one of its layers, {kinds}, is not supported; those of Qwen2, 2.5 and 3 are")
    vocabulary = model.get_input_embeddings().num_embeddings
    positions = getattr(settings, "max_position_embeddings", math.inf)
    for problem in problems:
        prompt = policy.encode_prompt(problem)
        longest = max(longest, len(prompt) + max_new_tokens)
        fits = prompt and max(prompt + policy.ends) < vocabulary and longest <= positions
        require(fits, f"{name}: {positions} positions or {vocabulary} words are too few for the "
                f"{len(prompt)} tokens of {problem.question[:50]!r} and --max_new_tokens")
    tokens = random.Random(0).choices(range(vocabulary), k=longest)
    prompts = [tokens[:3], tokens[:3], tokens[16:]]  # one prompt twice, and one as long as may be
    sampled = rollout(policy.sampler, prompts, 1, max_new_tokens=16, temperature=0,
                      eos_token_id=-1, pad_token_id=0)
    responses = [response for [response] in sampled]
    logprobs, _ = response_logprobs(model, prompts, responses)
    bound = 1e-3 if policy.sampler is model else 0.5  # for a bf16 copy; 0.25 was seen
    for prompt, response, ours in zip(prompts, responses, logprobs):
        ids = torch.tensor([prompt + response], device=model.device)
        plain = model(ids, logits_to_keep=17).logits[0, :-1].log_softmax(-1)  # (16, V)
        chosen = plain[range(16), response]
        gap, error = (plain.amax(-1) - chosen).max(), (ours - chosen).abs().max()
        require(gap < bound and error < 1e-3, f"{name}: cannot be trained here, or only with "
                f"--bf16 0: samples {gap:.2g} below the best, log-probs wrong by {error:.2g}")


# ---- Run folders ---------------------------------------------------------------------------------
# A run goes on if all its settings are as they were, but for these: where things are, what moves
# only memory or rounding, the number of steps, and what a later phase uses.
MAY_CHANGE = """out model data eval_data pool device threads sample_rows micro_tokens save_every
                steps collect_k collect_temperature collect_top_p replays""".split()


def open_folder(command, config, problems, fixed):
    """Makes or reopens a run's folder; returns its summary, {} if unfinished. fixed: names in
    MAY_CHANGE that this phase does use. Raises UserError if the folder is another run's."""
    out, pool = Path(config.out), Path(config.pool).read_bytes() if config.pool else b""
    weights = sorted(Path(config.model).glob("*.safetensors")) if config.model else []
    starts = [file.open("rb").read(10**6) for file in weights]  # 1 MB tells policies apart
    settings = {"command": command, **asdict(config), "contents of --pool": seed_of(pool),
                "contents of --model": seed_of(starts or config.model),
                "contents of --data": seed_of(problems),
                "code of score and verify": seed_of(*map(inspect.getsource, (score, verify)))}
    out.mkdir(parents=True, exist_ok=True)
    old = saved_row(out / "config.json")
    changed = [f"--{name}" if hasattr(config, name) else name for name, value in settings.items()
               if value != old.get(name) and (name in fixed or name not in MAY_CHANGE)]
    files = {file.name for file in out.iterdir()} - {"config.json.partial"}
    begun = files > {"config.json"} or (files and set(old) != set(settings))
    require(not (begun and changed), f"{out}: had other {', '.join(changed)}; give another --out")
    write_rows(out / "config.json", [settings])
    summary = saved_row(out / "summary.json")
    print(f"{out}: {'was finished' if summary else 'is under way'}")
    return summary


@contextmanager
def written_whole(path):
    """Gives a path to write to, which then replaces path: a crash leaves nothing half written."""
    unfinished = Path(f"{Path(path)}.partial")  # Path: without a slash at the end
    shutil.rmtree(unfinished, ignore_errors=True)  # what a crash left; a file is overwritten
    with blame(f"{unfinished}: cannot be written"):
        yield unfinished
    if unfinished.is_dir():  # a file is replaced as it is, and never replaces a folder
        shutil.rmtree(path, ignore_errors=True)
    os.replace(unfinished, path)


def write_rows(path, rows):
    """Writes one JSON line per row, the whole file or nothing."""
    with written_whole(path) as unfinished:
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def saved_row(path):
    """The first row of a file that write_rows wrote, {} if there is none. Raises UserError."""
    return next((row for _, row in read_rows(path)), {}) if path.exists() else {}


# ---- Errors and the command line -----------------------------------------------------------------
class UserError(Exception):
    """Bad input: reported as one line that names the thing and the remedy, with exit status 2."""


def require(condition, message):
    """Raises a UserError unless a condition holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def blame(message):
    """Makes any error a UserError. For libraries that read users' files, never for this file."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{message} ({str(error)[:200] or repr(error)})") from None


def parse(argv):
    """The command and the settings. Raises UserError for bad values, SystemExit for bad flags."""
    text = f"{__doc__}\n{inspect.getsource(Config)}\nDefaults without --model: {EMBEDDED}"
    parser = argparse.ArgumentParser("rlep.py", "rlep.py [COMMAND] [--FLAG VALUE ...]", text,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    commands = ["run", "train", "collect", "eval"]
    parser.add_argument("command", nargs="?", default="run", choices=commands)
    for flag in fields(Config):  # their help is the text of Config
        parser.add_argument(f"--{flag.name}", type=flag.type, help=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    config = Config(**(given if given.get("model") else EMBEDDED | given))
    for name, value in asdict(config).items():
        zero = name in ("seed", "bf16", "dual_clip", "overlong_buffer")
        good = isinstance(value, str) or value > 0 or value == 0 and zero
        require(good, f"--{name} {value}: must be above 0{', or 0' * zero}")
    require(not config.pool or command == "train", "--pool: is for train")
    names = [Path(path).name for path in (config.model, config.data, config.pool) if path]
    config.out = config.out or f"runs/{'-'.join([command, *names])}-seed{config.seed}"
    return command, config


def main(argv=None):
    """Runs a command. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    transformers.utils.logging.disable_progress_bar()
    try:
        command, config = parse(argv)
        torch.set_num_threads(config.threads)
        problems, held_out = load_problems(config)
        require(problems or command == "eval", f"--data {config.data}: all of it is held out")
        if command == "eval":
            evaluate(Policy(config, held_out), held_out, config, config.model)
        elif command == "collect":
            collect(config, problems)
        else:
            (run if command == "run" else train)(config, problems, held_out)
        return 0
    except (UserError, OSError) as error:
        message, status = "error: " + " ".join(str(error).split()), 2
    except (RuntimeError, MemoryError) as error:
        if not re.search("(?i)out ?of ?memory|allocate memory|alloc_failed|memoryerr", repr(error)):
            raise
        message, status = "error: out of memory; lower --sample_rows and --micro_tokens", 2
    except KeyboardInterrupt:
        message, status = "stopped; the same command goes on from what is saved", 130
    print("rlep.py:", message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # for odd terminals, and logs
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    sys.exit(main())
