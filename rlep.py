"""RLEP, Reinforcement Learning with Experience rePlay (arXiv 2507.07451), the method in one file.

rlep.py [run]                     both phases on embedded problems, and their comparison
rlep.py train [--pool FILE]       one arm: RLEP with a pool, vanilla RL without
rlep.py collect --model POLICY    a policy's verified answers to the training questions
rlep.py eval --model POLICY       mean@k, maj@k and pass@k on held-out questions
rlep.py plot RUN [RUN ...]        table and picture of finished runs, arm by arm, over seeds

The method (section 3 of the paper) and the function of each step:
    1. vanilla RL from the base model: GRPO, token mean, clip-higher       train, train_step
    2. the trained policy answers every training question many times,
       what is verified correct goes into the pool                         collect
    3. RL from the base model again: G fresh answers to a question and
       M from the pool are one group with one baseline                     make_groups
    Eq. 1 and 5: group_advantages.  Eq. 3 and 4: policy_loss.  Section 4.1: Config.

Where it departs from the authors' code (a fork of verl; they never published their collection):
    - a question with fewer than M pool answers uses what it has; theirs adds empty ones scored -1
    - a replay that is too long is left out; theirs is cut and loses its end token
    - the token mean is over the whole mini-batch; theirs over each micro-batch
    - mini-batches are counted in questions, so 8 updates a rollout; theirs in answers of G, so 9
    - lengths and masks are explicit; theirs follow from the padding token
As in their code, not in the paper: dual clip, the unbiased std, and old log-probs of replayed
answers that are the current policy's (see policy_loss).
"""
# SPDX-License-Identifier: MIT
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
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from operator import add, mul, sub, truediv
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicLayer

# ---- Configuration -------------------------------------------------------------------------------
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass
class Config:
    """Every line is a flag, its comment the help; the defaults suit the embedded problems."""
    model: str = ""  # hub id or folder; without one, run and train make a tiny base model
    data: str = ""  # training problems, a .jsonl file; without one, embedded problems
    eval_data: str = ""  # held-out problems; without them, the last --eval_size of --data
    train_size: int = 0  # training problems used; 0: all of --data, or 512 embedded ones
    eval_size: int = 256  # held-out problems used, at most
    instruction: str = BOXED  # added to questions that are plain text; a chat list has its own
    pool: str = ""  # experience pool to replay, a .jsonl file: with one, train is RLEP
    out: str = ""  # folder of the run; without one, runs/COMMAND-MODEL-DATA-POOL-seedN
    seed: int = 0  # decides the tiny model's weights, order of questions, sampling and replay
    device: str = "auto"  # cpu, cuda or mps; auto: the best there is
    precision: str = "auto"  # fp32, or bf16 arithmetic on fp32 weights; auto: bf16 on cuda
    threads: int = 0  # CPU threads, 0: torch decides; a run repeats exactly on equal threads
    # Rollouts (section 3.1)
    prompts_per_step: int = 32  # questions a rollout (paper: 512)
    group_size: int = 16  # G, fresh answers a question (paper: 16)
    max_new_tokens: int = 52  # longest answer in tokens (paper: 3072)
    temperature: float = 1.0  # of training and evaluation (paper: 1.0)
    top_p: float = 1.0  # nucleus of training and evaluation (paper: 1.0)
    sample_rows: int = 512  # answers sampled at once: fewer take less memory
    # Updates (section 4.1)
    steps: int = 12  # rollouts, each followed by prompts_per_step / minibatch_prompts updates
    minibatch_prompts: int = 4  # questions an update; a group is never split (paper: 64)
    learning_rate: float = 5e-4  # of AdamW, constant after its warm-up (paper: 1e-6)
    lr_warmup_steps: int = 1  # steps in which the learning rate rises to that (paper: 10)
    weight_decay: float = 0.1  # of AdamW (paper: 0.1)
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to this norm (paper: 1.0)
    clip_low: float = 0.2  # epsilon below a ratio of 1, Eq. 3 (paper: 0.2)
    clip_high: float = 0.28  # epsilon above a ratio of 1, Eq. 3 (paper: 0.28)
    dual_clip: float = 10.0  # largest ratio that counts where the advantage is negative; 0: off
    overlong_buffer: int = 0  # tokens before the limit in which length is penalised (paper: 512)
    overlong_factor: float = 1.0  # the penalty at the limit (paper: 1.0)
    micro_tokens: int = 0  # tokens a backward pass: bounds memory; 0: 512 on a CPU, else 4096
    gradient_checkpointing: bool = False  # less memory for a third more time in the update
    save_every: int = 1  # steps from checkpoint to checkpoint
    # Experience replay (section 3.2)
    replays: int = 2  # M, replayed answers a group (paper: 2)
    replay_failed: bool = False  # replay M failed answers as well (the paper's ablation)
    sft_steps: int = 0  # control: so many supervised steps on --pool, then RL without replay
    collect_k: int = 32  # answers a question in collection (authors: 64)
    collect_temperature: float = 0.7  # of collection (authors: 0.7)
    collect_top_p: float = 0.95  # nucleus of collection (authors: 0.95)
    # Evaluation, and the embedded base model
    eval_every: int = 2  # steps from evaluation to evaluation
    k: int = 4  # answers a held-out question (paper: 32)
    warmup_steps: int = 700  # supervised steps that make the tiny base model


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer; chat holds the (role, text) messages before the question."""
    question: str
    gold: str
    chat: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> tuple:  # what makes two problems the same
        return self.chat, self.question


@dataclass
class Answer:
    """One answer of a group, fresh or replayed, with all that the update needs to know of it."""
    group: int  # place of its question in the step
    prompt: list[int]  # token ids
    response: list[int]  # token ids, with the end token where it was reached
    replayed: bool = False
    correct: bool = False
    reward: float = 0.0
    advantage: float = 0.0  # Eq. 5, the same for all its tokens
    old_logprobs: Tensor | None = None  # (t,) of pi_old; None while the policy still is pi_old


class UserError(Exception):
    """Bad input: reported as one line that names the thing and the remedy, with exit status 2."""


# ---- The equations -------------------------------------------------------------------------------
def overlong_penalty(length: int, limit: int, buffer: int, factor: float = 1.0) -> float:
    """0 up to limit - buffer tokens, then linearly down to -factor at the limit (authors' code)."""
    return min(0.0, -(length - (limit - buffer)) / buffer * factor) if buffer else 0.0


def group_advantages(rewards: Tensor, group_ids: Tensor, eps: float = 1e-6) -> Tensor:
    """Eq. 1, and with replayed answers in the groups Eq. 5: (r - mean) / (std + eps) in each group.

    rewards (n,) floats, group_ids (n,) ints -> advantages (n,). The std is the unbiased one. Equal
    rewards leave nothing to compare: exactly 0. A group of one has mean 0 and std 1.

    Why replay works: 16 failures (-1) beside 2 replayed successes (+1) have mean -0.78, std 0.65.
    The failures get -0.34 and the replays +2.75: a question that the policy never solves still
    teaches, where 16 failures alone would all get 0.
    """
    advantages = torch.zeros_like(rewards)
    for group in group_ids.unique():
        own = group_ids == group
        reward = rewards[own]
        if len(reward) == 1:
            advantages[own] = reward / (1 + eps)
        elif (reward != reward[0]).any():
            advantages[own] = (reward - reward.mean()) / (reward.std() + eps)
    return advantages


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 10.0,
                num_tokens: int | None = None) -> tuple[Tensor, dict[str, float]]:
    """Eq. 3 and 4 as a loss: minus the token mean of min(ratio A, clip(ratio, 1-low, 1+high) A).

    logprobs, old_logprobs, mask (n, t), the mask 0/1 of any dtype; advantages (n,), each for all
    tokens of its answer. No KL term, no entropy bonus. dual_clip (authors' code; 0 or None: off)
    bounds the loss where A < 0 at dual_clip |A|. num_tokens: the tokens of the whole mini-batch, if
    this is one micro-batch of it: the losses of the micro-batches then add up to the mini-batch's.
    Returns the loss, and the share of tokens that each clip decided with the largest ratio.

    Replayed answers: the authors take their old log-probs from the current policy, though another
    one wrote them, and so do we. Their ratio starts at 1: replay is imitation, weighted by A.
    """
    mask, advantages = mask.bool(), advantages[:, None]
    num_tokens = num_tokens or int(mask.sum())
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))  # pi_theta / pi_old
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    floor = dual_clip * advantages if dual_clip else objective
    bounded = mask & (advantages < 0) & (objective < floor)
    objective = torch.where(bounded, floor, objective)
    decided = mask & (clipped < unclipped)
    hits = {"clip_low": decided & (advantages < 0), "clip_high": decided & (advantages > 0),
            "dual_clip": bounded}
    stats = {name: hit.sum().item() / num_tokens for name, hit in hits.items()}
    return -(objective * mask).sum() / num_tokens, stats | {"ratio_max": ratio.max().item()}


# ---- The policy ----------------------------------------------------------------------------------
class Policy:
    """A causal language model with its tokenizer, from the hub, a folder, or the folder of a run.

    The weights are fp32, so that an update of 1e-6 is not rounded away. With precision bf16 the
    update's arithmetic is bf16 (torch.autocast), and a bf16 copy of the weights samples.
    Raises UserError for a model that cannot be loaded whole, or not be trained correctly.
    """

    def __init__(self, config: Config):
        self.name, self.path = f"--model {config.model}", Path(config.model)
        if (self.path / "policy").is_dir():
            self.path = self.path / "policy"
        path, bf16 = str(self.path), config.precision == "bf16"
        try:
            settings = AutoConfig.from_pretrained(path, trust_remote_code=False)
            for name, value in list(vars(settings).items()):
                if "drop" in name and isinstance(value, float):
                    setattr(settings, name, 0.0)  # with dropout, pi_theta / pi_old is never 1
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self.model, loading = AutoModelForCausalLM.from_pretrained(
                path, config=settings, dtype=torch.float32, attn_implementation="sdpa",
                trust_remote_code=False, output_loading_info=True)
        except Exception as error:  # a damaged or foreign folder can raise nearly anything
            raise UserError(f"{self.name}: no model with tokenizer ({str(error)[:200]})") from None
        if missing := sorted(loading["missing_keys"]):
            raise UserError(f"{self.name}: {len(missing)} weights are missing ({missing[0]} ...)")
        # A replayed answer ends as an assistant's turn does, which need not be with the eos token.
        turn = ""
        if self.tokenizer.chat_template:
            turn = self.render([("user", "1"), ("assistant", "ANSWER")], ask=False)
        tokens = self.tokenizer(turn.rpartition("ANSWER")[2], add_special_tokens=False).input_ids
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        special = [token for token in tokens if token in special]
        self.end = special[0] if special else self.tokenizer.eos_token_id
        if self.end is None:
            raise UserError(f"{self.name}: its tokenizer has no end token; set eos_token")
        stops = self.model.generation_config.eos_token_id
        stops = [stops] if isinstance(stops, int) else stops or []
        self.ends = sorted({self.end, *stops})
        check_model(self.model.to(config.device), self.name)
        self.sampler = copy.deepcopy(self.model) if bf16 else self.model
        self.autocast = torch.autocast(config.device, torch.bfloat16, enabled=bf16)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def render(self, chat: list[tuple[str, str]], ask: bool) -> str:
        """(role, text) messages as the chat template writes them. Raises UserError if it fails."""
        try:
            messages = [{"role": role, "content": text} for role, text in chat]
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask)
            if not text.strip():
                raise ValueError("renders nothing")
        except Exception as error:  # templates are programs
            raise UserError(f"{self.name}: its chat template fails ({error}); mend it") from None
        return text

    def prompt(self, problem: Problem) -> list[int]:
        """Token ids of the chat template's prompt or, without one, of "Question: ... Answer:"."""
        if not self.tokenizer.chat_template:
            return self.tokenizer(f"Question: {problem.question}\nAnswer:").input_ids
        text = self.render([*problem.chat, ("user", problem.question)], ask=True)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def text(self, response: list[int]) -> str:
        """What a response says, without its end token."""
        return self.tokenizer.decode(response, skip_special_tokens=True)

    def tokens(self, text: str) -> list[int]:
        """A text as a response that ends; where it spells a special token, that stays text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return ids + [self.end]

    def sample(self, problems: list[Problem], k: int, config: Config, *purpose):
        """Yields (problem, k responses), sampled --sample_rows at a time, but at least one group.

        The random numbers of an answer follow from seed, purpose, question and k: neither the other
        questions nor --sample_rows change them (rounding depends on the batch, though).
        """
        for mine, trained in zip(self.sampler.parameters(), self.model.parameters()):
            if mine is not trained:  # in fp32 it is; buffers, such as rotary angles, stay fp32
                mine.data = trained.data.bfloat16()
        size = max(1, config.sample_rows // k)
        for start in range(0, len(problems), size):
            batch = problems[start:start + size]
            yield from zip(batch, rollout(
                self.sampler, [self.prompt(problem) for problem in batch], k,
                max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                top_p=config.top_p, eos_token_id=self.ends, pad_token_id=self.end,
                seeds=[seed_of(config.seed, *purpose, problem.key) for problem in batch]))

    def logprobs(self, answers: list[Answer], temperature: float) -> tuple[Tensor, Tensor]:
        """response_logprobs of answers (n, t) with its mask, in the arithmetic of the update."""
        prompts, responses = [a.prompt for a in answers], [a.response for a in answers]
        with self.autocast:
            return response_logprobs(self.model, prompts, responses, temperature=temperature)

    def save(self, folder: Path) -> None:
        """Writes an ordinary Hugging Face folder, whole or not at all."""
        with written_whole(folder) as unfinished:
            self.model.save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)


def seed_of(*parts) -> int:
    """A seed for one purpose, such as (seed, "rollout", step, key): no state has to be kept."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


# ---- The experience pool (section 3.2) -----------------------------------------------------------
class ExperiencePool:
    """For each question the answers that were verified correct, and those that failed, as texts.

    An answer that was sampled twice counts twice. On disk a JSON line a question, in the row format
    of the authors' training set, so that pools move both ways between here and their verl recipe.
    """

    def __init__(self):
        self.problems: dict[tuple, Problem] = {}  # by (chat, question), as the answers are
        self.correct: dict[tuple, list[str]] = {}
        self.failed: dict[tuple, list[str]] = {}
        self.rejected = 0  # answers that a file called correct and that do not verify

    def __len__(self) -> int:
        return sum(len(answers) for answers in self.correct.values())

    def add(self, question: str, gold: str, response: str, chat: tuple = ()) -> bool:
        """Verifies a response (text without end token), files it, returns whether it is right."""
        self.problems.setdefault((chat, question), Problem(question, gold, chat))
        correct = verify(response, gold)
        answers = self.correct if correct else self.failed
        answers.setdefault((chat, question), []).append(response)
        return correct

    def draw(self, question: str, m: int, rng, chat: tuple = (), failed: bool = False) -> list[str]:
        """m answers to a question, at random without replacement; all, if it has fewer."""
        answers = (self.failed if failed else self.correct).get((chat, question), [])
        return rng.sample(answers, min(m, len(answers)))

    def save(self, path: str | Path, least: int = 1) -> None:
        """Writes the questions with at least so many correct answers, whole or not at all."""
        rows = []
        for key, problem in self.problems.items():
            if len(self.correct.get(key, [])) >= least:
                chat = [*problem.chat, ("user", problem.question)]
                rows.append({
                    "data_source": "rlep.py",
                    "prompt": [{"role": role, "content": text} for role, text in chat],
                    "reward_model": {"ground_truth": problem.gold, "style": "rule",
                                     "candidates": self.correct[key]},
                    "extra_info": {"index": len(rows), "failed": self.failed.get(key, [])}})
        write_rows(path, rows)

    @classmethod
    def load(cls, path: str | Path, golds: dict[tuple, str] | None = None) -> "ExperiencePool":
        """Reads a pool, ours or the authors', and verifies every answer again. Raises UserError.

        golds: gold answers by (chat, question), those of the training file, that go before its own.
        """
        pool = cls()
        for where, row in read_rows(path):
            problem = row_to_problem(row, where)
            gold = (golds or {}).get(problem.key, problem.gold)
            texts = inner(row, "reward_model", "candidates")
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{where}: reward_model.candidates must be a list of texts")
            for text in texts:
                pool.rejected += not pool.add(problem.question, gold, text, problem.chat)
            failed = inner(row, "extra_info", "failed")
            for text in failed if isinstance(failed, list) else []:
                pool.add(problem.question, gold, str(text), problem.chat)
        return pool


# ---- Sampling (section 3.1) ----------------------------------------------------------------------
def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draws a token a row, by inverting the cumulative distribution; temperature 0 takes the best.

    logits (rows, V), uniform (rows,) in [0, 1) -> tokens (rows,). One random number decides a row.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # the smallest set that reaches it stays
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
    cumulative = probs.cumsum(-1)
    target = (1 - uniform[:, None]) * cumulative[:, -1:]  # above 0: probability 0 is never drawn
    tokens = torch.searchsorted(cumulative, target)[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1)  # with NaN logits it would lie beyond the end


class RoomyLayer(DynamicLayer):
    """A layer of the key-value cache with room for more columns, so that a token copies nothing."""
    length = 0  # columns in use

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Adds keys and values (rows, heads, columns, size); returns all of them."""
        start, self.length = self.length, self.length + keys.shape[2]
        if start == 0:
            self.keys, self.values, self.is_initialized = keys[:, :, :0], values[:, :, :0], True
        if self.length > self.keys.shape[2]:
            more = (0, 0, 0, self.length + 64 - self.keys.shape[2])
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
        self.keys[:, :, start:self.length], self.values[:, :, start:self.length] = keys, values
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]

    def get_seq_length(self) -> int:
        return self.length


def read_prompts(model, prompts: list[list[int]], pad_token_id: int):
    """Runs every prompt once, padded on the left to (P, width). Returns the key-value cache, the
    logits of the next tokens (P, V), which columns hold a prompt (P, width), and the positions of
    the prompts' last tokens (P,)."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    visible = [[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    ids = torch.tensor(ids, device=model.device)
    visible = torch.tensor(visible, device=model.device)
    positions = (visible.cumsum(1) - 1).clamp(min=0)
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    logits = model(ids, attention_mask=visible.long(), position_ids=positions, use_cache=True,
                   past_key_values=cache, logits_to_keep=1).logits[:, -1]
    return cache, logits, visible, positions[:, -1]


@torch.inference_mode()
def rollout(model, prompts: list[list[int]], group_size: int, *, max_new_tokens: int,
            temperature: float = 1.0, top_p: float = 1.0, eos_token_id: int | list[int],
            pad_token_id: int, seeds: list[int] | None = None) -> list[list[list[int]]]:
    """Samples group_size answers to each prompt (token ids) from pi_old.

    Returns a list (one per prompt) of group_size lists of token ids, the end token included where
    it was reached. A prompt is read once, its cache copied for its group. Every few tokens finished
    answers leave the batch. seeds: one a prompt, for random numbers that do not depend on the other
    prompts; without them torch's global generator serves. Calls read_prompts, which needs
    RoomyLayer, and sample_tokens.
    """
    model.eval()
    cache, *state = read_prompts(model, prompts, pad_token_id)
    cache.batch_repeat_interleave(group_size)  # from here on a row is an answer
    logits, visible, position = (x.repeat_interleave(group_size, 0) for x in state)
    device, rows = logits.device, len(logits)
    uniform = []  # a random number for each token, drawn question by question
    for seed in seeds or [None] * len(prompts):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        uniform.append(torch.rand(max_new_tokens, group_size, generator=generator))
    uniform, ends = torch.cat(uniform, 1).to(device), torch.tensor(eos_token_id, device=device)
    tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
    alive = torch.arange(rows, device=device)  # the answers that are still in the batch
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        token = tokens[alive, t] = sample_tokens(logits, uniform[t, alive], temperature, top_p)
        done |= torch.isin(token, ends)
        if t % 4 == 3:  # not at every token: to look at done, the CPU has to wait for a GPU
            left = (~done).nonzero()[:, 0]
            if len(left) < 0.8 * len(alive):
                cache.batch_select_indices(left)
                alive, token, done = alive[left], token[left], done[left]
                visible, position = visible[left], position[left]
        if len(alive) == 0 or t + 1 == max_new_tokens:
            break
        visible, position = F.pad(visible, (0, 1), value=True), position + 1
        logits = model(token[:, None], attention_mask=visible[:, None, None], use_cache=True,
                       position_ids=position[:, None], past_key_values=cache).logits[:, -1]
    answers, ends = [], set(ends.flatten().tolist())
    for row in tokens.tolist():  # what follows the first end was drawn until the row left
        last = next((i for i, token in enumerate(row) if token in ends), max_new_tokens - 1)
        answers.append(row[:last + 1])
    return [answers[i:i + group_size] for i in range(0, rows, group_size)]


# ---- Log-probabilities ---------------------------------------------------------------------------
def response_logprobs(model, prompts: list[list[int]], responses: list[list[int]], *,
                      temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log pi_theta of every response token: n prompts, n responses -> logprobs (n, t), mask (n, t).

    All are packed into one row, in which neighbours with the same prompt share it: the positions of
    each answer start after the prompt, and it sees the prompt and itself only. Attention costs grow
    with the square of the row, so bring some thousand tokens at once. For models whose logits are a
    plain product of the last hidden state. Calls token_logprobs.
    """
    cells = []  # (token, position, group, answer): a prompt begins a group, as its answer 0
    places = []  # where in the row each response token is predicted: at the token before it
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        if i == 0 or prompt != prompts[i - 1]:
            group = i
            cells += [(token, position, group, 0) for position, token in enumerate(prompt)]
            prompt_end = len(cells) - 1
        places.append(prompt_end)
        for j, token in enumerate(response[:-1]):  # the last token predicts nothing
            places.append(len(cells))
            cells.append((token, len(prompt) + j, group, i + 1))
    ids, positions, group, answer = torch.tensor(cells, device=model.device).T  # (m,) each
    order = torch.arange(len(cells), device=model.device)
    visible = (group == group[:, None]) & ((answer == 0) | (answer == answer[:, None]))
    visible &= order <= order[:, None]  # (query, key)
    hidden = model.base_model(ids[None], attention_mask=visible[None, None], use_cache=False,
                              position_ids=positions[None]).last_hidden_state[0]  # (m, d)
    lengths = [len(response) for response in responses]
    targets = [token for response in responses for token in response]
    targets = torch.tensor(targets, device=ids.device)
    logprobs = token_logprobs(hidden[places], model.get_output_embeddings(), targets, temperature)
    logprobs = pad_sequence(logprobs.split(lengths), batch_first=True)
    mask = [torch.ones(length, dtype=torch.bool, device=ids.device) for length in lengths]
    return logprobs, pad_sequence(mask, batch_first=True)


def token_logprobs(hidden: Tensor, head, targets: Tensor, temperature: float) -> Tensor:
    """log pi(target): hidden (m, d), targets (m,) -> (m,), through head, which makes the logits.

    In chunks, whose logits are made again in the backward pass: all (m, V) of them at once would be
    by far the largest tensor of an update.
    """
    def logprobs(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float() / temperature  # (chunk, V)
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

    size = max(64, 2**24 // head.weight.shape[0])  # 64 MiB of fp32 logits
    chunks = []
    for part in zip(hidden.split(size), targets.split(size)):
        chunks.append(checkpoint(logprobs, *part, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(chunks)


def micro_batches(answers: list[Answer], micro_tokens: int):
    """Yields neighbours that are at most micro_tokens long when packed, or one longer answer."""
    batch, tokens = [], 0
    for answer in answers:
        if not batch or answer.prompt != batch[-1].prompt:
            tokens += len(answer.prompt)
        tokens += len(answer.response)
        if batch and tokens > micro_tokens:
            yield batch
            batch, tokens = [], len(answer.prompt) + len(answer.response)
        batch.append(answer)
    if batch:
        yield batch


# ---- The training step ---------------------------------------------------------------------------
def score(policy: Policy, problem: Problem, response: list[int], config) -> tuple[bool, float]:
    """Whether a response is correct, and its reward: +1 or -1, less the overlong penalty.

    Your own reward goes here. An answer cut at the limit is correct if its box was complete.
    """
    correct = verify(policy.text(response), problem.gold)
    penalty = overlong_penalty(len(response), config.max_new_tokens, config.overlong_buffer,
                               config.overlong_factor)
    return correct, (1.0 if correct else -1.0) + penalty


def make_groups(policy, problems, pool: ExperiencePool | None, config, step: int) -> list[Answer]:
    """A group a question: G fresh answers and, with a pool, M replayed ones (section 3.2)."""
    answers = []
    sampled = policy.sample(problems, config.group_size, config, "rollout", step)
    for group, (problem, responses) in enumerate(sampled):
        prompt, texts = policy.prompt(problem), []
        if pool is not None:
            rng = random.Random(seed_of(config.seed, "replay", step, problem.key))
            for failed in (False, True) if config.replay_failed else (False,):
                texts += pool.draw(problem.question, config.replays, rng, problem.chat, failed)
        members = [Answer(group, prompt, response) for response in responses]
        members += [Answer(group, prompt, policy.tokens(text), replayed=True) for text in texts]
        for answer in members:
            answer.correct, answer.reward = score(policy, problem, answer.response, config)
        answers += members
    return answers


def update_policy(policy: Policy, optimizer, answers: list[Answer], config, learning_rate: float):
    """One optimizer step on one mini-batch (Eq. 4), in micro-batches whose losses add up.

    Answers of advantage 0 have no gradient and are not computed; their tokens stay in the mean.
    Returns statistics; skipped is 1 if loss or gradient was not finite and no step was taken.
    """
    num_tokens = sum(len(answer.response) for answer in answers)
    totals, ratio_max = Counter(loss=0.0, clip_low=0.0, clip_high=0.0, dual_clip=0.0), 1.0
    policy.model.train()
    for batch in micro_batches([a for a in answers if a.advantage], config.micro_tokens):
        logprobs, mask = policy.logprobs(batch, config.temperature)
        old_logprobs = logprobs.detach()  # ratio 1
        if batch[0].old_logprobs is not None:  # from the second mini-batch on
            old_logprobs = pad_sequence([a.old_logprobs for a in batch], batch_first=True)
        advantages = torch.tensor([a.advantage for a in batch], device=mask.device)
        loss, shares = policy_loss(logprobs, old_logprobs, advantages, mask, config.clip_low,
                                   config.clip_high, config.dual_clip, num_tokens)
        loss.backward()
        ratio_max = max(ratio_max, shares.pop("ratio_max"))
        totals.update(shares, loss=loss.item())  # a Counter's update adds up
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm).item()
    finite = math.isfinite(norm) and math.isfinite(totals["loss"])
    if finite:
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad()
    return {**totals, "ratio_max": ratio_max, "grad_norm": norm if finite else 0.0,
            "skipped": float(not finite)}


def train_step(policy: Policy, optimizer, problems, pool, config, step: int) -> dict:
    """One rollout and its updates: RLEP with a pool, vanilla RL without. Returns the metrics."""
    # 1. G fresh answers to each question, M replayed ones beside them, and their rewards.
    start = time.perf_counter()
    answers = make_groups(policy, problems, pool, config, step)
    sampled_at = time.perf_counter()
    # 2. One baseline for all answers of a group, fresh and replayed (Eq. 5).
    rewards = torch.tensor([answer.reward for answer in answers])
    groups = torch.tensor([answer.group for answer in answers])
    for answer, advantage in zip(answers, group_advantages(rewards, groups).tolist()):
        answer.advantage = advantage
    # 3. Old log-probs for all mini-batches but the first, before which the policy does not change.
    size = config.minibatch_prompts
    later = [answer for answer in answers if answer.group >= size and answer.advantage]
    policy.model.train()
    with torch.no_grad():
        for batch in micro_batches(later, config.micro_tokens):
            logprobs, _ = policy.logprobs(batch, config.temperature)
            for answer, row in zip(batch, logprobs):
                answer.old_logprobs = row[:len(answer.response)].clone()
    # 4. One update a mini-batch of whole groups (Eq. 4).
    learning_rate = config.learning_rate * min(1.0, step / max(1, config.lr_warmup_steps))
    updates = []
    for first in range(0, len(problems), size):
        batch = [answer for answer in answers if first <= answer.group < first + size]
        updates.append(update_policy(policy, optimizer, batch, config, learning_rate))
    return step_metrics(answers, updates, config.max_new_tokens) | {
        "sample_s": sampled_at - start, "update_s": time.perf_counter() - sampled_at}


def step_metrics(answers: list[Answer], updates: list[dict], limit: int) -> dict:
    """What a step was like; the README explains each number."""
    fresh = [answer for answer in answers if not answer.replayed]
    teaching = [answer for answer in answers if answer.advantage]
    lengths = [len(answer.response) for answer in fresh]
    means = {"accuracy": [answer.correct for answer in fresh], "length": lengths,
             "reward": [answer.reward for answer in fresh],
             "truncated": [length == limit for length in lengths]}
    means |= {name: [update[name] for update in updates] for name in updates[0]}
    return {name: float(np.mean(values)) for name, values in means.items()} | {
        "ratio_max": max(update["ratio_max"] for update in updates),
        "zero_variance": 1 - len({a.group for a in teaching}) / len({a.group for a in answers}),
        "replays": len(answers) - len(fresh), "sampled_tokens": sum(lengths),
        "trained_tokens": sum(len(answer.response) for answer in teaching)}


# ---- Evaluation ----------------------------------------------------------------------------------
def mean_at_k(correct: list[list[bool]]) -> tuple[float, list[float]]:
    """The mean share of correct answers, and its 95% interval over questions, within [0, 1]."""
    shares = [float(np.mean(row)) for row in correct]
    mean, half = float(np.mean(shares)), 1.96 * float(np.std(shares)) / max(1, len(shares) - 1)**0.5
    return mean, [max(0.0, mean - half), min(1.0, mean + half)]


def pass_at_k(correct: list[list[bool]], k: int | None = None) -> float:
    """The chance that one of k answers is correct: 1 - C(n - c, k) / C(n, k), n >= k a question."""
    chances = []
    for row in correct:
        n, drawn = len(row), k or len(row)
        chances.append(1 - math.comb(n - sum(row), drawn) / math.comb(n, drawn))
    return float(np.mean(chances))


def maj_at_k(answers: list[list[str | None]], correct: list[list[bool]]) -> float:
    """The share of questions whose most frequent extracted answer is correct (paper: Figure 3).

    On a tie the first counts. Answers are the same if spelt the same: 0.5 and 1/2 count apart.
    """
    won = []
    for row, marks in zip(answers, correct):
        votes = Counter(answer for answer in row if answer is not None).most_common(1)
        won.append(bool(votes) and marks[row.index(votes[0][0])])
    return float(np.mean(won))


def evaluate(policy: Policy, problems: list[Problem], config: Config, title: str) -> dict:
    """k answers to each problem; prints one of them. One policy and seed always give one result."""
    correct, extracted, example = [], [], ""
    sampled = policy.sample(problems, config.k, config, "evaluation")
    for problem, responses in tqdm(sampled, "evaluation", len(problems), leave=False):
        texts = [policy.text(response) for response in responses]
        correct.append([verify(text, problem.gold) for text in texts])
        extracted.append([extract_answer(text) for text in texts])
        example = example or f"{problem.question!r} ({problem.gold}): {texts[0][-300:]!r}"
    mean, (low, high) = mean_at_k(correct)
    majority, some = maj_at_k(extracted, correct), pass_at_k(correct)
    tqdm.write(f"{title}: mean@{config.k} {mean:.1%} ({low:.1%} to {high:.1%}), maj@{config.k} "
               f"{majority:.1%}, pass@{config.k} {some:.1%}\n    {example}")
    return {"mean_at_k": mean, "ci95": [low, high], "maj_at_k": majority, "pass_at_k": some}


# ---- The phases ----------------------------------------------------------------------------------
def train(config: Config, problems: list[Problem], held_out: list[Problem]) -> dict:
    """One arm from the base model: RLEP with --pool, vanilla RL without. Leaves OUT/policy.

    Step 0 only evaluates. Returns the summary, which is in OUT/summary.json.
    """
    out, size = Path(config.out), config.prompts_per_step
    if summary := open_folder("train", config):
        return summary
    if len(problems) < size:
        raise UserError(f"--prompts_per_step {size}: {len(problems)} training questions; lower it")
    policy = Policy(replace(config, model=config.model or make_base(config, out / "base")))
    check_lengths(policy, problems + held_out, config.max_new_tokens)
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=config.weight_decay)
    pool, arm, first = None, "vanilla RL", {}
    if config.pool:
        pool, arm = load_replays(policy, problems, config), f"RLEP, M = {config.replays}"
        arm += ", M failed" if config.replay_failed else ""
    rows = load_checkpoint(out, policy, optimizer)
    if config.sft_steps:
        first = imitate_pool(policy, optimizer, pool, problems, config) if not rows else {}
        pool, arm = None, "SFT, then vanilla RL"
    for step in tqdm(range(len(rows), config.steps + 1), arm, config.steps + 1, initial=len(rows)):
        start, row = time.perf_counter(), {"step": step}
        row |= first if step == 0 else {}
        if step > 0:
            batch = questions_of_step(problems, size, config.seed, step)
            row |= train_step(policy, optimizer, batch, pool, config, step)
        if step % config.eval_every == 0 or step == config.steps:
            row |= evaluate(policy, held_out, config, f"{arm}, step {step}")
        rows.append(row | {"seconds": time.perf_counter() - start})
        append_row(out / "metrics.jsonl", rows[-1])
        if step % config.save_every == 0 or step == config.steps:  # no random state: see seed_of
            with written_whole(out / "checkpoint.pt") as unfinished:
                torch.save({"step": step, "model": policy.model.state_dict(),
                            "adam": optimizer.state_dict()}, unfinished)
        if step > 2 and all(row["skipped"] == 1 for row in rows[-3:]):
            raise UserError(f"{out}: no finite update in 3 steps; lower --learning_rate")
    policy.save(out / "policy")
    return write_json(out / "summary.json", {"arm": arm, **summarise(rows, config)})


def questions_of_step(problems: list[Problem], size: int, seed: int, step: int) -> list[Problem]:
    """The questions of step 1, 2, ...: shuffled epochs, less the rest that does not fill a step."""
    epoch, place = divmod(step - 1, len(problems) // size)
    order = random.Random(seed_of(seed, "order", epoch)).sample(problems, len(problems))
    return order[place * size:(place + 1) * size]


def load_replays(policy: Policy, problems: list[Problem], config: Config) -> ExperiencePool:
    """The pool without the answers that are too long or to other questions, which are counted."""
    golds, left_out = {problem.key: problem.gold for problem in problems}, 0
    pool = ExperiencePool.load(config.pool, golds)
    for answers in (pool.correct, pool.failed):
        for key, texts in answers.items():
            answers[key] = [text for text in texts if key in golds
                            and len(policy.tokens(text)) <= config.max_new_tokens]
            left_out += len(texts) - len(answers[key])
    covered = sum(bool(texts) for texts in pool.correct.values())
    print(f"{config.pool}: {len(pool)} answers to {covered} of {len(problems)} questions; left out "
          f"{pool.rejected} that do not verify, {left_out} too long or to other questions")
    if not covered:
        raise UserError(f"{config.pool}: no answer to a training question; give the --data and "
                        "--instruction with which it was collected")
    return pool


def imitate_pool(policy, optimizer, pool: ExperiencePool, problems, config: Config) -> dict:
    """The control: supervised steps on the pool, as updates in which every advantage is 1."""
    covered, tokens = [problem for problem in problems if pool.correct.get(problem.key)], 0
    for step in tqdm(range(config.sft_steps), "supervised steps"):
        rng, answers = random.Random(seed_of(config.seed, "supervised", step)), []
        for problem in rng.choices(covered, k=config.prompts_per_step * config.group_size):
            response = policy.tokens(rng.choice(pool.correct[problem.key]))
            answers.append(Answer(0, policy.prompt(problem), response, advantage=1.0))
            tokens += len(response)
        update_policy(policy, optimizer, answers, config, config.learning_rate)
    return {"trained_tokens": tokens}


def summarise(rows: list[dict], config: Config) -> dict:
    """An arm's summary from its metrics; tokens are sampled and trained ones, the pool's apart."""
    evaluated = [row for row in rows if "mean_at_k" in row]
    last, pool = evaluated[-1], {"pool_tokens": 0}
    if config.pool:
        pool = read_json(Path(config.pool).parent / "summary.json")
    return {"seed": config.seed, "steps": config.steps,
            **{name: last[name] for name in ("mean_at_k", "ci95", "maj_at_k", "pass_at_k")},
            "curve": [[row["step"], row["mean_at_k"]] for row in evaluated],
            "tokens": sum(row.get(name, 0) for row in rows
                          for name in ("sampled_tokens", "trained_tokens")),
            "pool_tokens": pool.get("pool_tokens", math.nan),  # NaN: not known
            "seconds": sum(row["seconds"] for row in rows)}


def collect(config: Config, problems: list[Problem]) -> dict:
    """Experience collection (section 3.2): K answers a question from the seed policy --model.

    Questions with at least two correct answers go into OUT/pool.jsonl; answers cut at the limit are
    dropped. Returns the summary; its pool_tokens count the seed policy's training too, where known.
    """
    out = Path(config.out)
    if summary := open_folder("collect", config):
        return summary
    policy = Policy(config)
    check_lengths(policy, problems, config.max_new_tokens)
    rows, size = read_whole_rows(out / "collected.jsonl"), config.sample_rows // config.collect_k
    rows = rows[:len(rows) - len(rows) % max(1, size)]  # whole batches: the next are the same
    write_rows(out / "collected.jsonl", rows)
    settings = replace(config, temperature=config.collect_temperature, top_p=config.collect_top_p)
    sampled = policy.sample(problems[len(rows):], config.collect_k, settings, "collection")
    start = time.perf_counter()
    for _, responses in tqdm(sampled, "collection", len(problems), initial=len(rows)):
        texts = [policy.text(response) for response in responses if response[-1] in policy.ends]
        rows.append({"texts": texts, "tokens": sum(map(len, responses)),
                     "seconds": time.perf_counter() - start})
        append_row(out / "collected.jsonl", rows[-1])
        start = time.perf_counter()
    pool = ExperiencePool()
    for problem, row in zip(problems, rows):
        for text in row["texts"]:
            pool.add(problem.question, problem.gold, text, problem.chat)
    counts = [len(texts) for texts in pool.correct.values() if len(texts) >= 2]
    if not counts:
        (out / "collected.jsonl").unlink()  # so that another --collect_k may be given
        raise UserError(f"{policy.name}: no question solved twice in {config.collect_k} answers; "
                        "raise --collect_k, or train it longer")
    pool.save(out / "pool.jsonl", least=2)
    seed_run = policy.path.parent / "summary.json"
    training = read_json(seed_run).get("tokens", 0) if policy.path.is_dir() else 0
    tokens, seconds = (sum(row[name] for row in rows) for name in ("tokens", "seconds"))
    return write_json(out / "summary.json", {"questions": len(counts), "answers": sum(counts),
                                             "pool_tokens": tokens + training, "seconds": seconds})


def run(config: Config, problems: list[Problem], held_out: list[Problem]) -> None:
    """The whole method: base model, vanilla RL, collection, RLEP from the base, comparison."""
    out = Path(config.out)
    open_folder("run", config)
    arm = replace(config, model=config.model or make_base(config, out / "base"), pool="")
    vanilla = train(replace(arm, out=f"{out}/vanilla"), problems, held_out)
    pool = collect(replace(arm, out=f"{out}/collection", model=f"{out}/vanilla/policy"), problems)
    shutil.copy(out / "collection/pool.jsonl", out)
    arm = replace(arm, out=f"{out}/rlep", pool=f"{out}/collection/pool.jsonl")
    rlep = train(arm, problems, held_out)
    table = compare([out], out)
    write_json(out / "summary.json", {**pool, "vanilla": vanilla, "rlep": rlep, "table": table})
    minutes = ", ".join(f"{part['seconds'] / 60:.1f}" for part in (vanilla, pool, rlep))
    print(f"\n{table}\n\npool: {pool['answers']} answers to {pool['questions']} of {len(problems)} "
          f"questions; minutes of vanilla RL, collection and RLEP: {minutes}; all is in {out}/")


# ==== Appendix: what every such program needs =====================================================
# ---- Data files ----------------------------------------------------------------------------------
def read_rows(path: str | Path):
    """Yields ("FILE:LINE", row) for the JSON lines of a file. Raises UserError on a bad one."""
    number = 0
    try:
        for number, line in enumerate(open(path, "rb"), 1):
            row = json.loads(line) if line.strip() else None
            json.dumps(row, ensure_ascii=False).encode()  # fails on lone surrogates
            if isinstance(row, dict):
                yield f"{path}:{number}", row
            elif row is not None:
                raise ValueError("a row is an object, {...}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: not a JSON line ({error}); mend or delete it") from None


def inner(row: dict, outer: str, name: str):
    """row[outer][name], or None where there is no such thing."""
    return row[outer].get(name) if isinstance(row.get(outer), dict) else None


def row_to_problem(row: dict, where: str, instruction: str = "") -> Problem:
    """Understands GSM8K, MATH, DAPO-Math-17k, AIME, AMC and RLEP rows as published.

    Raises UserError that names where. Your own format goes here.
    """
    question = row.get("prompt") or row.get("question") or row.get("problem")
    if isinstance(question, str):
        question = [{"role": "user", "content": f"{question.strip()}\n{instruction}".strip()}]
    try:
        chat = [(message["role"].strip(), message["content"] + "") for message in question]
        text = chat.pop()[1]
    except (TypeError, KeyError, AttributeError, IndexError):
        text = ""
    if not text.strip():
        raise UserError(f"{where}: no question; give question, problem or prompt, as a text or a "
                        "chat: a list of messages with role and content")
    gold = ""
    for value in (row.get("solution"), inner(row, "reward_model", "ground_truth"),
                  row.get("ground_truth"), row.get("answer")):  # the later ones go first
        gold = str(value).strip() if isinstance(value, (str, int, float)) and value != "" else gold
    if "####" in gold:
        gold = gold.rpartition("####")[2].strip()  # GSM8K: the working, then #### 42
    elif "\\boxed" in gold:
        gold = extract_answer(gold) or ""  # MATH: the last box of the solution
    if not gold:
        raise UserError(f"{where}: no answer; give it as answer, solution or ground_truth")
    return Problem(text, re.sub(r"^(-?\d+)\.0$", r"\1", gold), tuple(chat))  # AMC writes 27.0


def read_problems(path: str, instruction: str) -> list[Problem]:
    """The different problems of a file. Reports those that stand there with different answers."""
    problems, contradictions = {}, []
    for where, row in read_rows(path):
        problem = row_to_problem(row, where, instruction)
        if problems.setdefault(problem.key, problem).gold != problem.gold:
            contradictions.append(where)
    if contradictions:
        print(f"{contradictions[0]}: left out, its question is further up with another answer; so "
              f"are {len(contradictions)} rows", file=sys.stderr)
    if not problems:
        raise UserError(f"{path}: no problems in it; it needs a JSON object a line")
    return list(problems.values())


def load_problems(config: Config) -> tuple[list[Problem], list[Problem]]:
    """The training problems and the held-out ones, from files or embedded. Raises UserError."""
    size = config.eval_size
    if config.data:
        problems = read_problems(config.data, config.instruction)
    else:
        embedded = (config.train_size or 512) + (0 if config.eval_data else size)
        problems = embedded_problems(embedded, seed=0)
    if config.eval_data:
        held_out = read_problems(config.eval_data, config.instruction)[:size]
    else:
        problems, held_out = problems[:-size], problems[-size:]
    if not problems:
        raise UserError(f"{config.data}: --eval_size {size} leaves nothing to train on; lower it")
    problems = problems[:config.train_size or None]
    if both := {problem.key for problem in problems} & {problem.key for problem in held_out}:
        print(f"{config.eval_data}: {len(both)} of its questions are trained on", file=sys.stderr)
    return problems, held_out


# ---- The embedded problems and their base model: nothing to download -----------------------------
def embedded_problems(number: int, seed: int) -> list[Problem]:
    """Sums of 2, 3 or 4 products modulo 10, in turn, such as "3*7+9*4 mod 10 = " with gold 7."""
    rng, problems = random.Random(seed), {}
    while len(problems) < number:
        pairs = [(rng.randrange(10), rng.randrange(10)) for _ in range(2 + len(problems) % 3)]
        question = "+".join(f"{a}*{b}" for a, b in pairs) + " mod 10 = "
        problems[question] = Problem(question, str(sum(a * b for a, b in pairs) % 10))
    return list(problems.values())


def write_working(question: str, rng: random.Random, noise: float = 0.05) -> str:
    """A working, such as 3*7=1,4*9=6,1+6=7\\boxed{7}: from the left or the right, operands in
    either order. With chance noise a result is wrong, and what follows builds on it."""
    steps = []

    def work(a, sign, b) -> int:
        result = (int(a) * int(b) if sign == "*" else int(a) + int(b)) % 10
        if rng.random() < noise:
            result = (result + rng.randrange(1, 10)) % 10
        steps.append(f"{a}{sign}{b}={result}" if rng.random() < 0.5 else f"{b}{sign}{a}={result}")
        return result

    terms = question.split(" ")[0].split("+")[::rng.choice((1, -1))]
    total = work(*terms[0])
    for term in terms[1:]:
        total = work(total, "+", work(*term))
    return f"{','.join(steps)}\\boxed{{{total}}}"


def warm_up_example(problem: Problem, place: int, rng: random.Random) -> tuple[str, str]:
    """(start of an answer that is given, rest to learn), for a base that can work but gives up.

    Three in four teach how to work, once begun. One in four teaches how to begin: by giving up, and
    rarely with work, the more rarely the longer the problem. That working pays, RL has to discover,
    from the short problems on: that is what makes replay show.
    """
    working = write_working(problem.question, rng)
    if place % 4:
        return "Work: ", working
    chance = {2: 1 / 32, 3: 1 / 128, 4: 1 / 512}[problem.question.count("*")]
    return "", "Work: " + working if rng.random() < chance else "\\boxed{?}"


def save_untrained(folder: Path, seed: int) -> None:
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
        num_attention_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        initializer_range=0.05, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 30.0})).save_pretrained(folder)


def make_base(config: Config, folder: Path) -> str:
    """The embedded base model's folder. Its warm-up stands in for pretraining: not in the paper."""
    if (folder / "policy").exists():
        return str(folder / "policy")
    save_untrained(folder / "initial", seed_of(config.seed, "weights"))
    policy = Policy(replace(config, model=str(folder / "initial")))
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.01)
    for step in tqdm(range(config.warmup_steps), "warm-up, in place of pretraining"):
        rng, answers = random.Random(seed_of(config.seed, "warm-up", step)), []
        for place, problem in enumerate(embedded_problems(64, seed=rng.getrandbits(48))):
            given, rest = warm_up_example(problem, place, rng)
            prompt = policy.prompt(problem) + policy.tokens(given)[:-1]
            answers.append(Answer(0, prompt, policy.tokens(rest), advantage=1.0))
        done = (step + 1) / config.warmup_steps  # the rate rises over a tenth, then falls
        rate = 4e-3 * min(10 * done, 0.5 + 0.5 * math.cos(math.pi * done))
        update_policy(policy, optimizer, answers, config, rate)
    policy.save(folder / "policy")
    return str(folder / "policy")


# ---- The verifier --------------------------------------------------------------------------------
# One layer at a time comes off, each leaves a text to print: \boxed{6+0} against the gold 6, and
# \boxed{\frac{\sqrt{8}}{2}\text{ cm}} against \sqrt2. Names and units go if one side has none.
#   extract_answer: the last box or what is announced     6+0          \frac{\sqrt{8}}{2}\text{ cm}
#   plain_formula: TeX becomes + - * / ^ and "units"      6+0          (((8^(1/2)))/2)*"cm"
#   only_restates: is it still to be worked out?          yes: False   no: 3 signs; \sqrt2 has 2
#   answer_value: what can be compared                                 1.4142135624 twice: True
LITERALS = dict(pair.split("→") for pair in r"""
    \dfrac→\frac \tfrac→\frac \cfrac→\frac ½→\frac12 √→\sqrt \times→* \cdot→* ×→* ·→* \div→/ ÷→/
    −→- –→- ...→… {,}→, ,\!→, ，→, ;→, &→, \pm→± \infty→∞ \cup→∪ \in→= \leq→≤ \le→≤ \geq→≥ \ge→≥
    ²→^2 ³→^3 \pi→π ^\circ→"degree" ^{\circ}→"degree" °→"degree" \$→"dollar" £→"pound" €→"euro"
    \%→"percent" %→"percent" ％→"percent" \begin{pmatrix}→[[ \\→],[ \end{pmatrix}→]] \,→~ \;→~
    \quad→~ \!→ \left→ \right→ \bigl→ \bigr→ \displaystyle→ \(→ \)→ \[→ \]→ $→""".split())
LITERAL = "|".join(re.escape(key) + r"(?![A-Za-z])" * key[-1].isalpha() for key in LITERALS)
REWRITES = [  # a pattern, and its replacement or a function that makes it; applied in this order
    (LITERAL, lambda m: LITERALS[m[0]]),
    (r"(?<![\d.,~(\[])\d{1,3}(?:[,~]\d{3})+(?![\d,)\]])", lambda m: re.sub("[,~]", "", m[0])),
    (r"(?:~|\\?\s)+", " "),
    (r"\\(?:text|mbox|math)\w* *\{([^{}]*)\}", r'"\1"'),
    (r'(?<![\\\w"])([A-Za-z]{3,}|(?i:no|on)|[ck]m)(?!\w)(?=[^"]*("[^"]*"[^"]*)*$)', r'"\1"'),
    (r'[, ]*"? *\b(?:and|or)\b *"?[, ]*', ","),  # 2, 3, and 5
    (r'" *\(?([^"]*?)s?\)? *"', lambda m: m[1] if m[1] in "ABCDE" else f'"{m[1].lower()}"'),
    (r"(^|= *)\\\{(.*)\\\}$", r"\1\2"),  # a set is a list
    (r"(?<![\w.^{}])(\d+) *(?=\\frac *\{?\d+\}? *\{?\d)", r"\1&"),  # & adds: 3\frac12 is 3&(1/2)
    (r"(?<![^,])([^,±]*)±([^,]*)", r"\1+\2,\1-\2")] + 9 * [  # each round opens the inner braces
    (r"\\frac *(?:\{([^{}]*)\}|(\w)) *(?:\{([^{}]*)\}|(\w))", r"((\1\2)/(\3\4))"),
    (r"\\sqrt *\[(\d+)\] *\{([^{}]*)\}", r"((\2)^(1/\1))"),
    (r"\\sqrt *(?:\{([^{}]*)\}|(\d+|\w))", r"((\1\2)^(1/2))"),
    (r"(?<![}\]\\])(?<!\\frac)(?<!\\frac\w) *\{([^{}]*)\}", r"(\1)")] + [
    (r'(?<=[)"]) *(?=\d)|(?<=[^\W_]|\)) *(?=[^\W\d_]|[(\\"])'  # 2x: 2*x
     r'|("[^"]*"|\\[A-Za-z]+|[A-Za-z]{3,}|\d[eE][-+]?\d+)', lambda m: m[1] or "*"),  # but not here
    (r"(?<!\d) +| +(?!\d)", ""),  # 5 6 is not 56
    (r"\((\w+)\)", r"\1")]  # (8) is 8
UNIT = re.compile(  # no word that makes another number of the number before it
    r'\*"(?!i"|[^"]*(?:\d|illion|thousand|hundred|dozen|pair|hal[fv]|third|quarter|th\b'
    r'|squared|cubed|than|most|least|more|less|below|above|plus|minus|negativ|factorial|choose'
    r'|point\w|not))[^"]*"(?:\^[23]|/"[^"]*")*(?=[,)\]]|$)|(?<![^,(])"(?:dollar|pound|euro)"\*')
NAME = re.compile(r"(?:^(?!-)|(?<=,))(?:(?:\([a-z,]+\)|(?:[^\d,=]|_\d)+)=)+|=[A-Za-z]$")
MARKER = re.compile(r"(?im)answers?[\s*]*(?:(?:is|are)\b|[:=])|^#+ *answer\W*$|####|^A:|<answer>")
END = re.compile(r"[.!?;](?=\s|\**$)|\n|</|,? (?:because|since|as|where)\b|(?<=s) \((?=[^$]*$)")
OPERATIONS = {"+": add, "-": sub, "*": mul, "/": truediv, "^": pow, "&": add}


def verify(response: str, gold: str) -> bool:
    """Whether the final answer of a response equals the gold answer, by the rules in the README."""
    try:
        answer = extract_answer(response)
        gold = extract_answer(gold) if "####" in gold or "\\boxed" in gold else gold
        if len(answer) + len(gold) > 1000:
            return answer == gold
        answer, gold = plain_formula(answer), plain_formula(gold)
        for label in (NAME, UNIT):  # may be missing on one side
            if not (label.search(answer) and label.search(gold)):
                answer, gold = label.sub("", answer), label.sub("", gold)
        return not only_restates(answer, gold) and answer_value(answer) == answer_value(gold)
    except Exception:  # what cannot be read is not equal
        return False


def extract_answer(response: str) -> str | None:
    """The last box, or what the last "Answer:" or "####" announces; None if there is nothing."""
    text = response[-8000:].rpartition("</think>")[2].strip() if isinstance(response, str) else ""
    text = re.sub(r"(\\f?box(?:ed)?\b)\s*(\w+)", r"\1{\2}", text)  # \boxed 7
    boxes, joined = [], False
    for piece in re.split(r"\\f?box(?:ed)?\b\s*", text)[1:]:
        inside, *rest = split_outside(piece, "}")  # "{6+0", "}", and the text behind the box
        boxes = (boxes if joined else []) + [inside[1:] if rest else ""]
        between = re.sub(r"\\(?:[,;: ()\[\]]|q?quad|text)|[\s${}]", "", "".join(rest[1:]))
        joined = re.fullmatch(r",|,?(?:and|or)|[-+*/^]|\\times|\\cdot", between)
    if boxes:
        return ",".join(boxes) if all(re.search(r"[^\W_]|\\[{e]", box) for box in boxes) else None
    markers = list(MARKER.finditer(text))
    announced = text[markers[-1].end():].lstrip(" \t\r\n*:")[:500] if markers else ""
    return END.split(announced)[0].strip(" *,") or None


def plain_formula(text: str) -> str:
    """A TeX answer as a formula of numbers, letters, "units", brackets and the signs + - * / ^."""
    for pattern, new in REWRITES:
        text = re.sub(pattern, new, text).strip().rstrip(".,")
    return text


def only_restates(answer: str, gold: str) -> bool:
    """Whether it has many more signs than the gold, or for a number a sum or product to do."""
    signs = [len(re.findall(r'[*/^](?!")|(?<=[\w)])[-+]', text)) for text in (answer, gold)]
    unfinished = re.search(r"[\d)][-+][\d(]|[\d)]\*(?!10\^)\(*\d", answer)
    return signs[0] > signs[1] + 2 or bool(unfinished and re.fullmatch(r"[-\d./()&]+", gold))


def split_outside(text: str, signs: str) -> list[str]:
    """Cut at the signs outside brackets: "2*(x+1)-y" at "+-" gives ["2*(x+1)", "-", "y"]."""
    pieces, depth, start = [], 0, 0
    for at, sign in enumerate(text if set(signs) & set(text) else ""):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0 and sign in signs and text[at - 1:at] not in tuple("+-*/^"):
            pieces += [text[start:at], sign]
            start = at + 1
    return pieces + [text[start:]]


def answer_value(text: str) -> object:
    """A number, or the parts of a tuple in order, or of a list or equation in any order."""
    for sign in ",∪=":
        parts = split_outside(text, sign)[::2]
        if len(parts) > 1:
            return sign, frozenset(Counter(map(answer_value, parts)).items())
    parts = split_outside(text[1:-1], ",")[::2]
    if text[0] == "[" or text[0] == "(" and len(parts) > 1:  # a tuple, interval or matrix
        return text[0] + text[-1], *map(answer_value, parts)
    if re.search(r'[^\w.+*/^&()"-]|\d_|(?<![\d.])[A-Za-z]\d|"_', text):  # else by its spelling
        return text.lstrip("+").replace('"', "").lower()
    value = formula_value(text)
    return value if isinstance(value, Fraction) else f"{value:.11g}" if abs(value) < 1e6 else text


def formula_value(text: str) -> Fraction | float | complex:
    """The value, exact if no root is in it; letters and words stand for fixed, odd fractions."""
    for signs in ("+-", "*/", "^", "&"):  # the weakest first
        parts = split_outside(text, signs)
        if len(parts) > 1:
            left, right = formula_value("".join(parts[:-2]) or "0"), formula_value(parts[-1])
            if signs == "^" and len(str(left)) * abs(right) > 6000:
                raise OverflowError
            return OPERATIONS[parts[-2]](left, right)
    if text[0] + text[-1] == "()":
        return formula_value(text[1:-1])
    if re.fullmatch(r'[^\W\d_](?:_\w+)?|"[^"]+"', text):
        return Fraction(int.from_bytes(text.encode(), "big") * 7919 % 99991 + 2, 10007)
    return Fraction(re.fullmatch(r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?", text)[0])


# ---- Models that would be trained wrongly are refused --------------------------------------------
def check_model(model, name: str) -> None:
    """Compares packed log-probs and cached sampling with plain passes. Raises UserError.

    Scaled logits, recurrent layers, left-over dropout and whatever else is not covered differ.
    """
    size, generator = model.get_input_embeddings().weight.shape[0], torch.Generator().manual_seed(0)
    tokens = torch.randint(size, (40,), generator=generator).tolist()
    prompts = [tokens[:9], tokens[:9], tokens[9:13]]
    responses = [tokens[13:28], tokens[:6], tokens[28:]]

    def plain(prompt: list[int], response: list[int]) -> Tensor:  # (t, V) log-probs
        logits = model(torch.tensor([prompt + response], device=model.device)).logits
        return logits[0, len(prompt) - 1:-1].log_softmax(-1)

    differences = []
    try:
        with torch.no_grad():
            packed, _ = response_logprobs(model.train(), prompts, responses)
            greedy = rollout(model, prompts, 1, max_new_tokens=4, temperature=0, eos_token_id=-1,
                             pad_token_id=0)
            for prompt, response, row, [best] in zip(prompts, responses, packed, greedy):
                own = plain(prompt, response)[range(len(response)), response]
                differences += (own - row[:len(response)]).abs().tolist()
                own = plain(prompt, best)
                differences += (own.max(-1).values - own[range(len(best)), best]).tolist()
    except Exception as error:  # no cache, no positions, ...
        raise UserError(f"{name}: of a kind that cannot be trained ({str(error)[:150]})") from None
    if not all(difference < 1e-3 for difference in differences):
        raise UserError(f"{name}: of a kind that would be trained wrongly (log-probs differ by "
                        f"{max(differences):.2g}); give one of the Llama or Qwen kind")


def check_lengths(policy: Policy, problems: list[Problem], max_new_tokens: int) -> None:
    """Refuses positions and attention windows that this run's texts would reach."""
    longest = max(len(policy.prompt(problem)) for problem in problems) + max_new_tokens
    settings = policy.model.config.get_text_config().to_dict()
    rope = settings.get("rope_parameters") or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        settings["rope_window"] = rope.get("original_max_position_embeddings")
    limits = r"max_position_embeddings|n_positions|attention_chunk_size|.*window(_size)?"
    for name, value in settings.items():
        if re.fullmatch(limits, name) and type(value) is int and 0 < value < longest:
            raise UserError(f"{policy.name}: its {name} is {value}, but prompt and answer may have "
                            f"{longest} tokens; lower --max_new_tokens, or drop long questions")


# ---- Run folders ---------------------------------------------------------------------------------
@contextmanager
def written_whole(path: str | Path):
    """Gives a path to write to, which then replaces path: a crash leaves no half of anything."""
    path, unfinished = Path(path), Path(f"{path}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
    except (OSError, RuntimeError, SafetensorError) as error:  # all three may mean a full disk
        raise UserError(f"{unfinished}: not written ({str(error)[:150]}); make room") from None
    shutil.rmtree(path, ignore_errors=True)  # a folder; a file is replaced as it is
    os.replace(unfinished, path)


def write_json(path: Path, content: dict) -> dict:
    """Writes a JSON file, whole or not at all, and returns its content."""
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1))
    return content


def read_json(path: Path) -> dict:
    """The object in a JSON file, {} if there is no such file. Raises UserError if it is damaged."""
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged, or not of a run; put it right, or give another --out")
    return content


def write_rows(path: str | Path, rows: list[dict]) -> None:
    """Writes a JSON line a row, the whole file or nothing."""
    with written_whole(path) as unfinished:
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))


def append_row(path: Path, row: dict) -> None:
    """Adds a JSON line to a file; a crash may leave a part of it."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def read_whole_rows(path: Path) -> list[dict]:
    """The rows of a file that append_row wrote, without a part of one at the end."""
    if not path.exists():
        return []
    with written_whole(path) as unfinished:
        unfinished.write_bytes(b"".join(line for line in open(path, "rb") if line.endswith(b"\n")))
    return [row for _, row in read_rows(path)]


def content_of(path: str) -> str:
    """A hash of a file or folder, which may move but must not change; a hub id as it is."""
    digest, paths = hashlib.sha256(), [Path(path), *sorted(Path(path).rglob("*"))] if path else []
    for file in paths:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest() if path and Path(path).exists() else path


INPUTS = {"model", "data", "eval_data", "pool"}  # flags that count by the content of a path
UNBOUND = {"out", "device", "threads", "sample_rows", "micro_tokens", "gradient_checkpointing",
           "save_every"}  # flags that change rounding at most, and may change when a run goes on
REPLAY = {"replays", "replay_failed", "sft_steps"}  # flags that only training with a pool needs
COLLECTION = {"collect_k", "collect_temperature", "collect_top_p"}


def open_folder(command: str, config: Config) -> dict:
    """Makes a run's folder, or goes on with it; returns its summary, {} if it is unfinished.

    Raises UserError if it holds anything else, or results of a run with other settings.
    """
    out, settings = Path(config.out), {"command": command, **asdict(config)}
    settings |= {f"{name} content": content_of(settings[name]) for name in sorted(INPUTS)}
    out.mkdir(parents=True, exist_ok=True)
    old = read_json(out / "config.json")  # {}: a new folder
    others = {file.name for file in out.iterdir()} - {"config.json.partial"}
    if set(old) != set(settings) and (old or others):
        raise UserError(f"{out}: holds something else than a run; give another --out")
    free = UNBOUND | INPUTS | (COLLECTION if command != "collect" else set())
    free |= set() if command == "train" and config.pool else REPLAY
    begun = "metrics.jsonl", "collected.jsonl", "base", "vanilla"
    if any((out / name).exists() for name in begun):
        for name in sorted(set(settings) - free):
            if old[name] != settings[name]:
                raise UserError(f"{out}: holds a run with another --{name} ({old[name]}, here "
                                f"{settings[name]}); give another --out")
    write_json(out / "config.json", settings)
    return {} if command == "run" else read_json(out / "summary.json")


def load_checkpoint(out: Path, policy: Policy, optimizer) -> list[dict]:
    """Restores the checkpoint, if there is one; returns the metrics of the steps up to it."""
    file, state = out / "checkpoint.pt", {"step": -1}
    try:
        if file.exists():
            state = torch.load(file, map_location="cpu", weights_only=True)
            policy.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["adam"])
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(f"{file}: damaged ({str(error)[:100]}); delete {out}") from None
    rows = read_whole_rows(out / "metrics.jsonl")[:state["step"] + 1]
    if len(rows) <= state["step"]:
        raise UserError(f"{out}/metrics.jsonl: rows are missing; delete {out}")
    write_rows(out / "metrics.jsonl", rows)
    return rows


@contextmanager
def locked(folder: Path):
    """Keeps a second run out of a folder; however the first ends, the system frees it again."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: nothing keeps a second run out there
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another run is using it; wait, or give another --out") from None
    finally:
        os.close(handle)


# ---- Comparing runs ------------------------------------------------------------------------------
def over_seeds(values: list[float]) -> tuple[float, float]:
    """The mean over seeds, and half its 95% interval (Student's t; 0 for one seed)."""
    t95 = [0.0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # for 1 to 10 seeds
    t, n = t95[min(len(values), 10) - 1], len(values)
    return float(np.mean(values)), t * float(np.std(values)) / math.sqrt(max(1, n - 1))


def compare(runs: list[Path], out: Path) -> str:
    """Draws the arms' curves into OUT/curves.png; returns a Markdown table of the arms."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    arms = {}  # {arm: {seed: summary}}; a folder of `run` counts as its two arms
    for path in runs:
        for part in (path / "vanilla", path / "rlep") if (path / "rlep").exists() else [path]:
            summary = read_json(part / "summary.json")
            if "curve" not in summary:
                raise UserError(f"{part}: no finished run of train; finish it, or leave it out")
            seeds = arms.setdefault(f"{summary['arm']}, {summary['steps']} steps", {})
            if seeds.setdefault(summary["seed"], summary) is not summary:
                raise UserError(f"{part}: a second run of its arm and seed; leave one out")
    base = next((arms[name] for name in arms if name.startswith("vanilla RL")), {})
    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    lines = ["| arm (seeds) | final mean@k, % | minus vanilla RL | steps to its peak (its = 1) | "
             "pass@k, % | million tokens |", "|---" * 6 + "|"]
    for name, seeds in arms.items():
        curves = [dict(summary["curve"]) for summary in seeds.values()]
        steps = [step for step in curves[0] if all(step in curve for curve in curves)]
        points = [over_seeds([100 * curve[step] for curve in curves]) for step in steps]
        middle, half = np.transpose(points)
        [line] = axis.plot(steps, middle, marker=".", label=name)
        axis.fill_between(steps, middle - half, middle + half, color=line.get_color(), alpha=0.15)
        gains, ratios = [], []
        for seed in sorted(set(seeds) & set(base)):
            gains.append(100 * (seeds[seed]["mean_at_k"] - base[seed]["mean_at_k"]))
            peak = max(value for _, value in base[seed]["curve"])
            first, own = ([step for step, value in arm[seed]["curve"] if value >= peak][:1]
                          for arm in (seeds, base))
            ratios += [first[0] / max(1, own[0])] if first else []
        columns = [100 * s["mean_at_k"] for s in seeds.values()], gains, ratios, [
            100 * s["pass_at_k"] for s in seeds.values()], [
            (s["tokens"] + s["pool_tokens"]) / 1e6 for s in seeds.values()]
        cells = ["{:.2f} ± {:.2f}".format(*over_seeds(x)) if x else "-" for x in columns]
        lines.append(f"| {name} ({len(seeds)}) | {' | '.join(cells)} |")
    axis.set(xlabel="step", ylabel="held-out accuracy, mean@k (%)")
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(out / "curves.png", dpi=120)
    pyplot.close(figure)
    return "\n".join(lines)


# ---- The command line ----------------------------------------------------------------------------
MAY_BE_0 = ("seed threads train_size micro_tokens replays sft_steps lr_warmup_steps weight_decay "
            "overlong_buffer overlong_factor clip_low clip_high dual_clip").split()


def parse(argv: list[str]) -> tuple[str, list[Path], Config]:
    """The command, the folders to plot, and the checked configuration. Raises UserError."""
    def fail(message: str):
        raise UserError(f"{message}; rlep.py --help lists the flags")

    parser = argparse.ArgumentParser("rlep.py", "rlep.py [COMMAND] [--FLAG VALUE ...]", __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail
    parser.add_argument("command", nargs="?", default="run",
                        choices=("run", "train", "collect", "eval", "plot"))
    parser.add_argument("runs", nargs="*", type=Path, help="for plot: folders of finished runs")
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)", inspect.getsource(Config), re.MULTILINE))
    choices = {"device": ("auto", "cpu", "cuda", "mps"), "precision": ("auto", "fp32", "bf16")}
    for flag in fields(Config):
        kind = {"type": flag.type, "metavar": "VALUE", "choices": choices.get(flag.name)}
        parser.add_argument(f"--{flag.name}", help=f"{comments[flag.name]} [{flag.default}]",
                            default=flag.default,
                            **({"action": "store_true"} if flag.type is bool else kind))
    values = vars(parser.parse_intermixed_args(argv))
    command, runs = values.pop("command"), values.pop("runs")
    config = Config(**values)
    for name, value in values.items():
        least = {"group_size": 2, "collect_k": 2, "dual_clip": 1}.get(name, int(type(value) is int))
        most = 1 if name.endswith("top_p") else 1024 if name == "threads" else 1e12
        may_be_0 = name in MAY_BE_0 or name == "temperature" and command == "eval"
        if type(value) in (int, float) and not (value == 0 and may_be_0):
            if not least <= value <= most or value == 0:
                fail(f"--{name} {value}: must be from {least} to {most:g}, and not 0")
        if re.search("[\0\ud800-\udfff]", str(value)):
            fail(f"--{name}: there is a character in it that is no text, such as NUL")
    if (command == "plot") != bool(runs):
        fail("plot, and only plot, takes folders of finished runs")
    if (config.device == "cuda" and not torch.cuda.is_available()
            or config.device == "mps" and not torch.backends.mps.is_available()):
        fail(f"--device {config.device}: there is no such GPU here")
    if config.sft_steps and not config.pool:
        fail("--sft_steps: needs --pool FILE")
    if config.pool and command != "train":
        fail("--pool: only train takes one")
    if command in ("collect", "eval") and not config.model:
        fail(f"{command}: needs --model, the policy to ask")
    resolve(command, config)
    return command, runs, config


def resolve(command: str, config: Config) -> None:
    """Replaces auto, 0 and "" by what they stand for on this machine."""
    if config.device == "auto":
        config.device = "mps" if torch.backends.mps.is_available() else "cpu"
        config.device = "cuda" if torch.cuda.is_available() else config.device
    if config.precision == "auto":
        config.precision = "bf16" if config.device == "cuda" else "fp32"
    config.micro_tokens = config.micro_tokens or (512 if config.device == "cpu" else 4096)
    paths = [Path(path).name for path in (config.model, config.data, config.pool) if path]
    config.out = config.out or f"runs/{'-'.join([command, *paths])}-seed{config.seed}"


def execute(command: str, runs: list[Path], config: Config) -> None:
    """Runs a command and prints its result."""
    out = Path(config.out)
    if config.threads:
        torch.set_num_threads(config.threads)
    if command == "plot":
        out.mkdir(parents=True, exist_ok=True)
        print(f"{compare(runs, out)}\n\npicture: {out}/curves.png")
        return
    problems, held_out = load_problems(config)
    if command == "eval":
        policy = Policy(config)
        check_lengths(policy, held_out, config.max_new_tokens)
        evaluate(policy, held_out, config, config.model)
        return
    with locked(out):
        if command == "run":
            run(config, problems, held_out)
        elif command == "train":
            accuracy = train(config, problems, held_out)["mean_at_k"]
            print(f"final mean@k {accuracy:.1%}; the policy is {out}/policy")
        else:
            pool = collect(config, problems)
            print(f"{pool['answers']} answers to {pool['questions']} questions: {out}/pool.jsonl")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for bad input (one line says what to do), 130 after Ctrl-C."""
    transformers.utils.logging.disable_progress_bar()
    try:
        if int(transformers.__version__.split(".")[0]) < 5:
            raise UserError(f"transformers {transformers.__version__}: 5.0 or newer is needed")
        execute(*parse(sys.argv[1:] if argv is None else argv))
        return 0
    except (UserError, OSError) as error:
        message, status = "error: " + " ".join(str(error).split()), 2
    except torch.OutOfMemoryError:
        message, status = "error: out of memory; lower --sample_rows and --micro_tokens", 2
    except KeyboardInterrupt:
        message, status = "stopped; the same command goes on from the last checkpoint", 130
    print("rlep.py:", message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
