"""RLEP, Reinforcement Learning with Experience rePlay (arXiv 2507.07451), in one file. MIT licence.

rlep.py [run]                     both phases on embedded problems, and their comparison
rlep.py train [--pool FILE]       one arm: RLEP with a pool, vanilla RL without
rlep.py collect --model POLICY    a policy's verified answers to the training questions
rlep.py eval --model POLICY       mean@k, maj@k and pass@k on held-out questions
rlep.py plot RUN [RUN ...]        table and picture of finished runs, arm by arm, over seeds

The method (section 3 of the paper; Eq. 1 and 5: group_advantages, Eq. 3 and 4: policy_loss):
    1. train: vanilla RL from the base model (GRPO, token mean, clip-higher)
    2. collect: that policy answers every question many times; what is correct fills the pool
    3. train --pool: RL from the base model again; G fresh answers to a question and M from the
       pool are one group with one baseline (make_groups)
Not as in the authors' code (a fork of verl; they never published their collection):
    - a question with fewer than M pool answers uses what it has; theirs adds empty ones scored -1
    - a replay that is too long is left out; theirs is cut and loses its end token
    - the token mean is over the whole mini-batch (Eq. 3: one group); theirs over a micro-batch
    - mini-batches are counted in questions, so 8 updates a rollout; theirs in answers of G, so 9
    - lengths and masks are explicit; theirs follow from the padding token
As there, but not in the paper: dual clip, unbiased std, and log-probs of the policy at the start of
the step as the old log-probs of replays (see policy_loss).
"""
import argparse
import copy
import fcntl
import hashlib
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
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from operator import add, mul, sub, truediv
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

# ---- Configuration -------------------------------------------------------------------------------
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
DEVICE = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


@dataclass
class Config:
    """Every line is a flag, its comment the help; the defaults suit the embedded problems."""
    model: str = ""  # hub id or folder; without one, run and train make a tiny base model
    data: str = ""  # training problems, a .jsonl file; without one, embedded problems
    eval_data: str = ""  # held-out problems; without them, the last --eval_size of --data
    train_size: int = 0  # training problems used; 0: all of --data, or 512 embedded ones
    eval_size: int = 256  # held-out problems used, at most
    pool: str = ""  # experience pool to replay, a .jsonl file: with one, train is RLEP
    out: str = ""  # folder of the run; without one, runs/COMMAND-MODEL-DATA-POOL-seedN
    seed: int = 0  # decides the tiny model's weights, order of questions, sampling and replay
    device: str = DEVICE  # cpu, cuda, mps or another that torch has
    bf16: int = int(DEVICE == "cuda")  # 1: bf16 arithmetic on fp32 weights, 0: all in fp32
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
    clip_low: float = 0.2  # epsilon below a ratio of 1, Eq. 3 (paper: 0.2)
    clip_high: float = 0.28  # epsilon above a ratio of 1, Eq. 3 (paper: 0.28)
    dual_clip: float = 10.0  # largest ratio that counts where the advantage is negative; 0: off
    overlong_buffer: int = 0  # tokens before the limit in which length is penalised (paper: 512)
    micro_tokens: int = 512 if DEVICE == "cpu" else 4096  # tokens a backward pass: bounds memory
    save_every: int = 1  # steps from checkpoint to checkpoint
    # Experience replay (section 3.2)
    replays: int = 2  # M, replayed answers a group (paper: 2)
    replay_failed: int = 0  # failed answers a group, replayed as well (the paper's ablation)
    sft_steps: int = 0  # control: so many first steps imitate the replays, then RL without them
    collect_k: int = 32  # answers a question in collection (authors: 64)
    collect_temperature: float = 0.7  # of collection (authors: 0.7)
    collect_top_p: float = 0.95  # nucleus of collection (authors: 0.95)
    # Evaluation, and the embedded base model
    eval_every: int = 2  # steps from evaluation to evaluation
    k: int = 4  # answers a held-out question (paper: 32)
    warmup_steps: int = 700  # supervised steps that make the tiny base model


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer, which does not count when two problems are compared."""
    question: str
    gold: str = field(compare=False)
    chat: tuple[tuple[str, str], ...] = ()  # (role, text) messages before the question


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
    old_logprobs: Tensor | None = None  # (t,) of pi_old; None: the policy's own, so ratio 1


class UserError(Exception):
    """Bad input: reported as one line that names the thing and the remedy, with exit status 2."""


@contextmanager
def blame(message: str):
    """Turns whatever goes wrong inside into a UserError: the message, and the error in brackets."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files and foreign models can raise nearly anything
        raise UserError(f"{message} ({str(error)[:200]})") from None


# ---- The equations -------------------------------------------------------------------------------
def overlong_penalty(length: int, limit: int, buffer: int, factor: float = 1.0) -> float:
    """0 up to limit - buffer tokens, then linearly down to -factor at the limit (authors' code)."""
    return min(0.0, -(length - (limit - buffer)) / buffer * factor) if buffer else 0.0


def group_advantages(rewards: Tensor, group_ids: Tensor, eps: float = 1e-6) -> Tensor:
    """Eq. 1, and with replayed answers in the groups Eq. 5: (r - mean) / (std + eps) in each group.
    rewards (n,) floats, group_ids (n,) ints -> advantages (n,). The std is the unbiased one. Equal
    rewards get exactly 0. A group of one has mean 0 and std 1. Why replay works: 16 failures (-1)
    beside 2 replayed successes (+1) get -0.34 and +2.75; 16 failures alone would teach nothing."""
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
    logprobs, old_logprobs, mask (n, t), the mask 0/1 of any dtype; advantages (n,), one an answer.
    dual_clip (authors' code; 0 or None: off) keeps the objective above dual_clip A where A < 0.
    num_tokens: those of the whole mini-batch, if this is one of its micro-batches, whose losses add
    up. Returns the loss and the shares of tokens that clip_low and clip_high decided.
    Replayed answers: the authors take their old log-probs from the policy at the start of the step,
    not from the one that wrote them. So do we: replay is imitation, weighted by A."""
    mask, advantages = mask.bool(), advantages[:, None]
    num_tokens = num_tokens or int(mask.sum())
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))  # pi_theta / pi_old
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    if dual_clip:
        objective = objective.maximum((dual_clip * advantages).where(advantages < 0, -math.inf))
    decided = mask & (clipped < unclipped)
    stats = {"clip_low": (decided & (advantages < 0)).sum().item() / num_tokens,
             "clip_high": (decided & (advantages > 0)).sum().item() / num_tokens}
    return -(objective * mask).sum() / num_tokens, stats


# ---- The policy ----------------------------------------------------------------------------------
class Policy:
    """A causal language model with its tokenizer. Weights are fp32: an update of 1e-6 would be
    rounded away in bf16. With --bf16 1 the update's arithmetic is bf16 (torch.autocast), and
    a bf16 copy samples. Raises UserError if it cannot be loaded whole or trained correctly."""

    def __init__(self, config: Config, problems: list[Problem]):
        self.name = f"--model {config.model}"
        with blame(f"{self.name}: no model with tokenizer, or no --device {config.device}"):
            self.tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
            self.model, loading = AutoModelForCausalLM.from_pretrained(
                config.model, trust_remote_code=False, output_loading_info=True,
                dtype=torch.float32, attn_implementation="sdpa")
            assert not loading["missing_keys"], f"missing are {sorted(loading['missing_keys'])[:3]}"
            self.model.to(config.device).eval()  # with dropout, pi_theta / pi_old is never 1
        self.end = self.tokenizer.eos_token_id
        with blame(f"{self.name}: mend its tokenizer or chat template"):
            if self.tokenizer.chat_template:  # an assistant's turn need not end with the eos token
                turn = self.render([("user", "1"), ("assistant", "ANSWER")]).rpartition("ANSWER")[2]
                special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
                tokens = self.tokenizer(turn, add_special_tokens=False).input_ids
                self.end = next((token for token in tokens if token in special), self.end)
            lengths = [len(self.prompt(problem)) for problem in problems]
            assert self.end is not None and 0 not in lengths, "no end token, or it renders nothing"
        stops = self.model.generation_config.eos_token_id or []
        self.ends = [self.end, *([stops] if isinstance(stops, int) else stops)]
        check_model(self.model, self.name, max(lengths) + config.max_new_tokens)
        self.sampler = copy.deepcopy(self.model) if config.bf16 else self.model
        self.autocast = torch.autocast(config.device, torch.bfloat16, enabled=bool(config.bf16))

    def prompt(self, problem: Problem) -> list[int]:
        """Token ids of the chat template's prompt or, without one, of "Question: ... Answer:"."""
        if not self.tokenizer.chat_template:
            before = "".join(f"{text}\n\n" for _, text in problem.chat)
            return self.tokenizer(f"{before}Question: {problem.question}\nAnswer:").input_ids
        text = self.render([*problem.chat, ("user", problem.question)], add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def render(self, chat: list[tuple[str, str]], **settings) -> str:
        """(role, text) messages as the chat template writes them."""
        messages = [{"role": role, "content": text} for role, text in chat]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **settings)

    def text(self, response: list[int]) -> str:
        """What a response says, without its end token."""
        return self.tokenizer.decode(response, skip_special_tokens=True)

    def tokens(self, text: str) -> list[int]:
        """A text as a response that ends; where it spells a special token, that stays text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return ids + [self.end]

    def sample(self, problems: list[Problem], k: int, config: Config, *purpose):
        """Yields (problem, k responses), which follow from seed, purpose, question and k alone."""
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
                seeds=[seed_of(config.seed, *purpose, problem) for problem in batch]))

    def logprobs(self, answers: list[Answer], temperature: float) -> tuple[Tensor, Tensor]:
        """response_logprobs of answers (n, t) with its mask, in the arithmetic of the update."""
        with self.autocast:
            return response_logprobs(self.model, [a.prompt for a in answers],
                                     [a.response for a in answers], temperature=temperature)

    def save(self, folder: Path) -> None:
        """Writes an ordinary Hugging Face folder, whole or not at all."""
        with written_whole(folder) as unfinished:
            self.model.save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)


def seed_of(*parts) -> int:
    """A seed for one purpose, as of (seed, "rollout", step, problem): no state has to be kept."""
    parts = tuple((p.chat, p.question) if isinstance(p, Problem) else p for p in parts)
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


# ---- The experience pool (section 3.2) -----------------------------------------------------------
@dataclass
class ExperiencePool:
    """A list of verified answers for each question, and one of failed ones; equal texts all count.
    On disk a JSON line a question, in the row format of the authors' training set."""
    correct: dict[Problem, list[str]] = field(default_factory=dict)
    failed: dict[Problem, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(answers) for answers in self.correct.values())

    def add(self, question: str, gold: str, response: str, chat: tuple = ()) -> bool:
        """Verifies a response (text without end token), files it, returns whether it is right."""
        correct = verify(response, gold)
        answers = self.correct if correct else self.failed
        answers.setdefault(Problem(question, gold, chat), []).append(response)
        return correct

    def draw(self, question: str, m: int, rng, chat: tuple = (), failed: bool = False) -> list[str]:
        """m answers to a question, at random without replacement; all, if it has fewer."""
        pool = self.failed if failed else self.correct
        answers = pool.get(Problem(question, "", chat), [])
        return rng.sample(answers, min(m, len(answers)))

    def save(self, path: str | Path) -> None:
        """Writes the questions that have correct answers, whole or not at all."""
        rows = []
        for problem, texts in self.correct.items():
            chat = [*problem.chat, ("user", problem.question)]
            prompt = [{"role": role, "content": text} for role, text in chat]
            verified = {"ground_truth": problem.gold, "style": "rule", "candidates": texts}
            others = {"index": len(rows), "failed": self.failed.get(problem, [])}
            rows.append({"data_source": "math_dapo", "prompt": prompt, "reward_model": verified,
                         "extra_info": others})
        write_rows(path, rows)

    @classmethod
    def load(cls, path: str | Path) -> "ExperiencePool":
        """Reads a pool, ours or the authors', and verifies every answer again. Raises UserError."""
        pool = cls()
        for where, row in read_rows(path):
            problem = row_to_problem(row, where)
            with blame(f"{where}: reward_model.candidates must be a list of texts"):
                failed = (row.get("extra_info") or {}).get("failed", [])
                for text in row["reward_model"]["candidates"] + failed:
                    pool.add(problem.question, problem.gold, text + "", problem.chat)  # a text
        return pool


# ---- Sampling (section 3.1) ----------------------------------------------------------------------
def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """logits (rows, V) -> tokens (rows,): the best ones at temperature 0, else those at the places
    uniform (rows,), each in [0, 1), in the cumulative distribution of the row."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # the smallest set that reaches it stays
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
    cumulative = probs.cumsum(-1)
    target = (1 - uniform[:, None]) * cumulative[:, -1:]  # above 0: probability 0 is never drawn
    return torch.searchsorted(cumulative, target)[:, 0].clamp(max=logits.shape[-1] - 1)  # for NaN


@torch.inference_mode()
def rollout(model, prompts: list[list[int]], group_size: int, *, max_new_tokens: int,
            temperature: float = 1.0, top_p: float = 1.0, eos_token_id: int | list[int],
            pad_token_id: int, seeds: list[int] | None = None) -> list[list[list[int]]]:
    """Samples group_size answers to each prompt (token ids): a list (one per prompt) of group_size
    lists of token ids, the end token included where it was reached. A prompt is read once, its
    cache copied for its group; finished answers leave the batch. seeds: one a prompt, for its own
    random numbers. Calls read_prompts (which calls RoomyLayer) and sample_tokens."""
    model.eval()
    cache, *state = read_prompts(model, prompts, pad_token_id)
    cache.batch_repeat_interleave(group_size)  # from here on a row is an answer
    logits, visible, position = (x.repeat_interleave(group_size, 0) for x in state)
    uniform = []  # a random number for each token, drawn question by question
    for seed in seeds or [None] * len(prompts):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        uniform.append(torch.rand(max_new_tokens, group_size, generator=generator))
    uniform = torch.cat(uniform, 1).to(model.device)
    ends = torch.tensor(eos_token_id, device=model.device)
    tokens = torch.zeros(len(logits), max_new_tokens, dtype=torch.long, device=model.device)
    alive = torch.arange(len(logits), device=model.device)  # the answers still in the batch
    done = torch.zeros(len(logits), dtype=torch.bool, device=model.device)
    for t in range(max_new_tokens):
        token = tokens[alive, t] = sample_tokens(logits, uniform[t, alive], temperature, top_p)
        done |= torch.isin(token, ends)
        if t % 4 == 3:  # not at every token: to look at done, the CPU has to wait for a GPU
            keep = (~done).nonzero()[:, 0]
            if len(keep) < 0.8 * len(alive):
                cache.batch_select_indices(keep)
                alive, token, done = alive[keep], token[keep], done[keep]
                visible, position = visible[keep], position[keep]
        if len(alive) == 0 or t + 1 == max_new_tokens:
            break
        visible = torch.cat([visible, visible.new_ones(len(visible), 1)], 1)
        position = position + 1
        logits = model(token[:, None], attention_mask=visible[:, None, None], use_cache=True,
                       position_ids=position[:, None], past_key_values=cache).logits[:, -1]
    answers = []
    for row, ended in zip(tokens.tolist(), torch.isin(tokens, ends).tolist()):
        length = ended.index(True) + 1 if True in ended else max_new_tokens
        answers.append(row[:length])  # what follows was drawn before the answer left the batch
    return [answers[i:i + group_size] for i in range(0, len(answers), group_size)]


class RoomyLayer(DynamicLayer):
    """A cache layer that writes in place: the stock one copies all that it holds at every token."""
    length = 0  # places in use, of (rows, heads, places, d); get_seq_length counts the others too

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + keys.shape[2]
        if start == 0 or start == self.keys.shape[2]:  # no place: these and 64 more are added
            super().update(*(torch.nn.functional.pad(x, (0, 0, 0, 64)) for x in (keys, values)))
        self.keys[:, :, start:self.length] = keys
        self.values[:, :, start:self.length] = values
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]


def read_prompts(model, prompts: list[list[int]], pad_token_id: int):
    """Runs every prompt once, padded on the left to (P, width). Returns the key-value cache, the
    next logits (P, V), which columns hold a prompt (P, width), and the last positions (P,)."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], True, pad_token_id, "left")
    visible = pad_sequence([torch.ones(len(prompt)) for prompt in prompts], True, 0, "left").bool()
    ids, visible = ids.to(model.device), visible.to(model.device)
    positions = (visible.cumsum(1) - 1).clamp(min=0)
    output = model(ids, attention_mask=visible.long(), position_ids=positions, use_cache=True,
                   past_key_values=Cache(layer_class_to_replicate=RoomyLayer), logits_to_keep=1)
    return output.past_key_values, output.logits[:, -1], visible, positions[:, -1]


# ---- Log-probabilities ---------------------------------------------------------------------------
def response_logprobs(model, prompts: list[list[int]], responses: list[list[int]], *,
                      temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log pi_theta of every response token: n prompts, n responses -> logprobs (n, t), mask (n, t).
    All are packed into one row, in which neighbours with the same prompt share it: the positions of
    each answer start after the prompt, and it sees the prompt and itself only. Bring some thousand
    tokens at once; the logits must be a product of the last hidden state. Calls token_logprobs."""
    cells = []  # (token, position, group, answer): a prompt begins a group, as its answer 0
    places = []  # where in the row each response token is predicted: at the token before it
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        if i == 0 or prompt != prompts[i - 1]:
            first = i
            cells += [(token, position, first, 0) for position, token in enumerate(prompt)]
            prompt_end = len(cells) - 1
        places.append(prompt_end)
        for j, token in enumerate(response[:-1]):  # the last token predicts nothing
            places.append(len(cells))
            cells.append((token, len(prompt) + j, first, i + 1))
    ids, positions, group, answer = torch.tensor(cells, device=model.device).T  # (m,) each
    visible = (group == group[:, None]) & ((answer == 0) | (answer == answer[:, None]))
    visible = visible.tril()[None, None]  # (1, 1, query, key)
    hidden = model.base_model(ids[None], attention_mask=visible, position_ids=positions[None],
                              use_cache=False).last_hidden_state[0]  # (m, d)
    targets = torch.tensor([token for response in responses for token in response])
    logprobs = token_logprobs(hidden[places], model.get_output_embeddings(),
                              targets.to(model.device), temperature)
    lengths = [len(response) for response in responses]
    logprobs = pad_sequence(logprobs.split(lengths), batch_first=True)
    columns = torch.arange(logprobs.shape[1], device=model.device)
    return logprobs, columns < torch.tensor(lengths, device=model.device)[:, None]


def token_logprobs(hidden: Tensor, head, targets: Tensor, temperature: float) -> Tensor:
    """log pi(target): hidden (m, d), targets (m,) -> (m,), through head, which makes the logits. In
    chunks, whose logits are made again in the backward pass: all (m, V) at once would be huge."""
    def logprobs(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float() / temperature  # (chunk, V)
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

    size = max(64, 2**24 // head.weight.shape[0])  # 64 MiB of fp32 logits
    chunks = [recomputed(logprobs, *part, use_reentrant=False, preserve_rng_state=False)
              for part in zip(hidden.split(size), targets.split(size))]
    return torch.cat(chunks)


def micro_batches(answers: list[Answer], micro_tokens: int) -> list[list[Answer]]:
    """Neighbours that are at most micro_tokens long when packed, or one longer answer."""
    batches, tokens = [], math.inf
    for answer in answers:
        shared = batches and answer.prompt == batches[-1][-1].prompt
        tokens += len(answer.response) + (0 if shared else len(answer.prompt))
        if tokens > micro_tokens:
            batches.append([])
            tokens = len(answer.prompt) + len(answer.response)
        batches[-1].append(answer)
    return batches


# ---- The training step ---------------------------------------------------------------------------
def score(policy: Policy, problem: Problem, response: list[int], config) -> tuple[bool, float]:
    """Whether a response is correct, and its reward, +1 or -1 less the penalty. Yours goes here."""
    correct = verify(policy.text(response), problem.gold)
    penalty = overlong_penalty(len(response), config.max_new_tokens, config.overlong_buffer)
    return correct, (1.0 if correct else -1.0) + penalty


def make_groups(policy, problems, pool: ExperiencePool | None, config, step: int) -> list[Answer]:
    """A group a question: G fresh answers and, with a pool, M replayed ones (section 3.2)."""
    answers = []
    sampled = policy.sample(problems, config.group_size, config, "rollout", step)
    for group, (problem, responses) in enumerate(sampled):
        prompt = policy.prompt(problem)
        members = [Answer(group, prompt, response) for response in responses]
        if pool is not None:
            rng = random.Random(seed_of(config.seed, "replay", step, problem))
            texts = pool.draw(problem.question, config.replays, rng, problem.chat)
            texts += pool.draw(problem.question, config.replay_failed, rng, problem.chat, True)
            members += [Answer(group, prompt, policy.tokens(text), replayed=True) for text in texts]
        for answer in members:
            answer.correct, answer.reward = score(policy, problem, answer.response, config)
        answers += members
    return answers


def update_policy(policy: Policy, optimizer, answers: list[Answer], config, learning_rate: float):
    """One optimizer step on one mini-batch (Eq. 4), in micro-batches whose losses add up. Answers
    of advantage 0 have no gradient and are not computed; their tokens stay in the mean."""
    num_tokens = sum(len(answer.response) for answer in answers)
    stats = Counter(loss=0.0, clip_low=0.0, clip_high=0.0)
    for batch in micro_batches([a for a in answers if a.advantage], config.micro_tokens):
        logprobs, mask = policy.logprobs(batch, config.temperature)
        old_logprobs = logprobs.detach()  # ratio 1
        if batch[0].old_logprobs is not None:  # from the second mini-batch on, unless supervised
            old_logprobs = pad_sequence([a.old_logprobs for a in batch], batch_first=True)
        advantages = torch.tensor([a.advantage for a in batch], device=mask.device)
        loss, shares = policy_loss(logprobs, old_logprobs, advantages, mask, config.clip_low,
                                   config.clip_high, config.dual_clip, num_tokens)
        loss.backward()
        stats.update(shares, loss=loss.item())  # a Counter's update adds up
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0).item()  # paper: 1.0
    if math.isfinite(norm):
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad()
    return {**stats, "grad_norm": norm, "skipped": float(not math.isfinite(norm))}


def train_step(policy: Policy, optimizer, problems, pool, config, step: int) -> dict:
    """One rollout and its updates: RLEP with a pool, else vanilla RL. Returns the metrics."""
    # 1. G fresh answers to each question, M replayed ones beside them, and their rewards.
    start = time.perf_counter()
    answers = make_groups(policy, problems, pool, config, step)
    sampled_at = time.perf_counter()
    # 2. One baseline for all answers of a group, fresh and replayed (Eq. 5).
    rewards = torch.tensor([answer.reward for answer in answers])
    groups = torch.tensor([answer.group for answer in answers])
    supervised = step <= config.sft_steps  # the control: right replays alone, advantage 1
    for answer, advantage in zip(answers, group_advantages(rewards, groups).tolist()):
        answer.advantage = float(answer.replayed and answer.correct) if supervised else advantage
    # 3. Old log-probs for all mini-batches but the first, before which the policy does not change.
    size = config.minibatch_prompts
    teaching = [answer for answer in answers if answer.advantage]
    later = [answer for answer in teaching if answer.group >= size and not supervised]
    with torch.no_grad():
        for batch in micro_batches(later, config.micro_tokens):
            logprobs, _ = policy.logprobs(batch, config.temperature)
            for answer, row in zip(batch, logprobs):
                answer.old_logprobs = row[:len(answer.response)].clone()
    # 4. One update a mini-batch of whole groups (Eq. 4).
    learning_rate = config.learning_rate * min(1.0, step / max(1, config.lr_warmup_steps))
    updates = []
    for first in range(0, len(problems), size):
        batch = [a for a in (teaching if supervised else answers) if 0 <= a.group - first < size]
        updates.append(update_policy(policy, optimizer, batch, config, learning_rate))
    # What it was like; the README explains each number.
    fresh = [answer for answer in answers if not answer.replayed]
    lengths = [len(answer.response) for answer in fresh]
    metrics = {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}
    return metrics | {
        "accuracy": float(np.mean([answer.correct for answer in fresh])),
        "reward": float(np.mean([answer.reward for answer in fresh])),
        "length": float(np.mean(lengths)), "replays": len(answers) - len(fresh),
        "truncated": lengths.count(config.max_new_tokens) / len(lengths),
        "zero_variance": 1 - len({answer.group for answer in teaching}) / len(problems),
        "sampled_tokens": sum(lengths), "trained_tokens": sum(len(a.response) for a in teaching),
        "sample_s": sampled_at - start, "update_s": time.perf_counter() - sampled_at}


# ---- Evaluation ----------------------------------------------------------------------------------
def mean_at_k(correct: list[list[bool]]) -> tuple[float, list[float]]:
    """The mean share of correct answers, and its 95% interval over questions, within [0, 1]."""
    shares = [float(np.mean(row)) for row in correct]
    mean = float(np.mean(shares))
    half = 1.96 * float(np.std(shares)) / max(1, len(shares) - 1)**0.5
    return mean, [max(0.0, mean - half), min(1.0, mean + half)]


def pass_at_k(correct: list[list[bool]], k: int) -> float:
    """The chance that one of k answers is correct: 1 - C(n - c, k) / C(n, k), of n a question."""
    n = len(correct[0])
    return float(np.mean([1 - math.comb(n - sum(row), k) / math.comb(n, k) for row in correct]))


def maj_at_k(answers: list[list[str | None]], correct: list[list[bool]]) -> float:
    """The share of questions whose most frequent answer, as it is spelt, is correct (Figure 3)."""
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
    majority, some = maj_at_k(extracted, correct), pass_at_k(correct, config.k)
    tqdm.write(f"{title}: mean@{config.k} {mean:.1%} ({low:.1%} to {high:.1%}), maj@{config.k} "
               f"{majority:.1%}, pass@{config.k} {some:.1%}\n    {example}")
    return {"mean_at_k": mean, "ci95": [low, high], "maj_at_k": majority, "pass_at_k": some}


# ---- The phases ----------------------------------------------------------------------------------
def train(config: Config, problems: list[Problem], held_out: list[Problem]) -> dict:
    """One arm from the base model: RLEP with --pool, vanilla RL without. Step 0 is the base itself.
    Leaves OUT/policy and OUT/summary.json, which is returned."""
    out = Path(config.out)
    if summary := open_folder("train", config):
        return summary
    base = config.model or make_base(config, out / "base")
    policy = Policy(replace(config, model=base), problems + held_out)
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.1)  # paper: 0.1
    pool, arm = None, "vanilla RL"
    if config.pool:
        pool, arm = load_replays(policy, problems, config), f"RLEP, M = {config.replays}"
        arm += f", {config.replay_failed} failed" if config.replay_failed else ""
        arm = f"{config.sft_steps} steps of SFT, then vanilla RL" if config.sft_steps else arm
    rows, checkpoint = [], out / "checkpoint.pt"
    if checkpoint.exists():
        with blame(f"{checkpoint}: damaged; delete {out}"):
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            policy.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["adam"])
            rows = state["rows"]  # the metrics of the steps up to it
    size = min(config.prompts_per_step, len(problems))
    for step in tqdm(range(len(rows), config.steps + 1), arm, config.steps + 1, initial=len(rows)):
        row = {"step": step}
        if step > 0:  # shuffled epochs, each less the rest that does not fill a step
            epoch, place = divmod(step - 1, len(problems) // size)
            rng = random.Random(seed_of(config.seed, "order", epoch))
            batch = rng.sample(problems, len(problems))[place * size:(place + 1) * size]
            replays = None if 0 < config.sft_steps < step else pool
            row |= train_step(policy, optimizer, batch, replays, config, step)
        if step % config.eval_every == 0 or step == config.steps:
            row |= evaluate(policy, held_out, config, f"{arm}, step {step}")
        rows.append(row)
        write_rows(out / "metrics.jsonl", rows)
        if step % config.save_every == 0 or step == config.steps:  # no random state: see seed_of
            with written_whole(checkpoint) as unfinished:
                torch.save({"rows": rows, "model": policy.model.state_dict(),
                            "adam": optimizer.state_dict()}, unfinished)
    policy.save(out / "policy")
    curve = [[row["step"], row["mean_at_k"]] for row in rows if "mean_at_k" in row]
    summary = rows[-1] | {"arm": arm, "seed": config.seed, "curve": curve}
    write_rows(out / "summary.json", [summary])
    return summary


def load_replays(policy: Policy, problems, config: Config) -> ExperiencePool:
    """The answers of --pool to training questions, verified by the gold there and not too long."""
    stored, pool = ExperiencePool.load(config.pool), ExperiencePool()
    for problem in problems:
        for text in stored.correct.get(problem, []) + stored.failed.get(problem, []):
            if len(policy.tokens(text)) <= config.max_new_tokens:
                pool.add(problem.question, problem.gold, text, problem.chat)
    print(f"{config.pool}: {len(pool)} of {len(stored)} correct answers serve, to "
          f"{len(pool.correct)} of {len(problems)} questions (others: too long, wrong or unasked)")
    if not pool.correct:
        raise UserError(f"{config.pool}: no answer to a question of the --data; give its own")
    return pool


def collect(config: Config, problems: list[Problem]) -> dict:
    """Experience collection (section 3.2): --model answers every question K times. What is correct
    and not cut goes into OUT/pool.jsonl, if a question has two of them. Returns the summary."""
    out = Path(config.out)
    if summary := open_folder("collect", config):
        return summary
    policy = Policy(config, problems)
    settings = replace(config, temperature=config.collect_temperature, top_p=config.collect_top_p)
    rows = saved_rows(out / "collected.jsonl")
    for first in tqdm(range(len(rows), len(problems), config.prompts_per_step), "collection"):
        batch = problems[first:first + config.prompts_per_step]
        for _, responses in policy.sample(batch, config.collect_k, settings, "collection"):
            texts = [policy.text(response) for response in responses if response[-1] in policy.ends]
            rows.append({"texts": texts})
        write_rows(out / "collected.jsonl", rows)
    pool = ExperiencePool()
    for problem, row in zip(problems, rows):
        for text in row["texts"]:
            pool.add(problem.question, problem.gold, text, problem.chat)
    pool.correct = {problem: texts for problem, texts in pool.correct.items() if len(texts) >= 2}
    if not pool.correct:
        (out / "collected.jsonl").unlink()  # so that another --collect_k may be given
        raise UserError(f"{policy.name}: solves no question twice; raise --collect_k")
    pool.save(out / "pool.jsonl")
    summary = {"questions": len(pool.correct), "answers": len(pool)}
    write_rows(out / "summary.json", [summary])
    return summary


def run(config: Config, problems: list[Problem], held_out: list[Problem]) -> None:
    """The whole method: base model, vanilla RL, collection, RLEP from the base, comparison."""
    out = Path(config.out)
    open_folder("run", config)
    own = replace(config, model=config.model or make_base(config, out / "base"))
    vanilla = train(replace(own, out=f"{out}/vanilla"), problems, held_out)
    pool = collect(replace(own, out=f"{out}/collection", model=f"{out}/vanilla/policy"), problems)
    shutil.copy(out / "collection/pool.jsonl", out)
    rlep = train(replace(own, out=f"{out}/rlep", pool=f"{out}/pool.jsonl"), problems, held_out)
    table = compare([out], out)
    write_rows(out / "summary.json", [{**pool, "vanilla": vanilla, "rlep": rlep, "table": table}])
    print(f"\n{table}\n\npool: {pool['answers']} answers to {pool['questions']} questions")


# ==== Appendix: what every such program needs. Data files =========================================
def read_rows(path: str | Path):
    """Yields ("FILE:LINE", row) for the JSON lines of a file. Raises UserError on a bad one."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                with blame(f"{path}:{number}: not a JSON object; mend or delete it"):
                    row = {**json.loads(line)}
                yield f"{path}:{number}", row


def row_to_problem(row: dict, where: str) -> Problem:
    """Understands GSM8K, MATH, DAPO-Math-17k, AIME, AMC and RLEP rows as published, and names where
    in the UserError for others. Your own format goes here."""
    question = row.get("prompt") or row.get("question") or row.get("problem")
    if isinstance(question, str):
        question = [{"role": "user", "content": f"{question.strip()}\n{BOXED}"}]
    with blame(f"{where}: no question; give question, problem or prompt: a text, or a chat list"):
        chat = [(message["role"] + "", message["content"] + "") for message in question]  # texts
        text = chat.pop()[1]
        assert text.strip(), "it is empty"
    with blame(f"{where}: no answer; give it as answer, solution or ground_truth"):
        inner = (row.get("reward_model") or {}).get("ground_truth")
        golds = [row.get("answer"), row.get("ground_truth"), inner, row.get("solution")]
        gold = next((str(x) for x in golds if isinstance(x, (str, int, float)) and x != ""), "")
        if re.search(r"####|\\f?box", gold):
            gold = extract_answer("####" + gold.rpartition("####")[2]) or ""  # GSM8K; MATH: the box
        assert gold.strip(), "it is empty"
    return Problem(text, gold.strip(), tuple(chat))


def load_problems(config: Config) -> tuple[list[Problem], list[Problem]]:
    """The training problems and the held-out ones, from files or embedded. Raises UserError."""
    def read(path: str) -> list[Problem]:  # of equal ones the first counts
        return list(dict.fromkeys(row_to_problem(row, where) for where, row in read_rows(path)))

    size, number = config.eval_size, (config.train_size or 512) + config.eval_size
    problems = read(config.data) if config.data else embedded_problems(number, seed=0)
    held_out = read(config.eval_data)[:size] if config.eval_data else problems[-size:]
    if not (config.data and config.eval_data):
        problems = problems[:-size]
    if not held_out or len(problems) < max(1, config.train_size):
        raise UserError(f"{config.data or 'embedded problems'} {config.eval_data}: too few; lower "
                        "--train_size or --eval_size")
    return problems[:config.train_size or None], held_out


# ---- The embedded problems and their base model: nothing to download -----------------------------
def embedded_problems(number: int, seed: int) -> list[Problem]:
    """Sums of 2, 3 or 4 products modulo 10, in turn, such as "3*7+9*4 mod 10 = " with gold 7."""
    rng, problems = random.Random(seed), {}
    while len(problems) < min(number, 25_000):  # there are 10,000 sums of two products
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

    total = None
    for a, sign, b in question.split(" ")[0].split("+")[::rng.choice((1, -1))]:
        product = work(a, sign, b)
        total = product if total is None else work(total, "+", product)
    return f"{','.join(steps)}\\boxed{{{total}}}"


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
    """The embedded base model's folder. Its warm-up, in place of pretraining, makes a model that
    can work but gives up: three examples in four teach how a begun working goes on, one how to
    begin: by giving up, and rarely, the rarer the longer the problem, by working."""
    if (folder / "policy").exists():
        return str(folder / "policy")
    save_untrained(folder / "initial", seed_of(config.seed, "weights"))
    config = replace(config, model=f"{folder}/initial", temperature=1.0)
    policy = Policy(config, embedded_problems(3, seed=0))
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.01)
    for step in tqdm(range(config.warmup_steps), "warm-up, in place of pretraining"):
        rng, answers = random.Random(seed_of(config.seed, "warm-up", step)), []
        for place, problem in enumerate(embedded_problems(64, seed=rng.getrandbits(48))):
            prompt, working = policy.prompt(problem), write_working(problem.question, rng)
            if place % 4:
                prompt += policy.tokens("Work: ")[:-1]
            elif rng.random() < {2: 1 / 32, 3: 1 / 128, 4: 1 / 512}[problem.question.count("*")]:
                working = "Work: " + working
            else:
                working = "\\boxed{?}"
            answers.append(Answer(0, prompt, policy.tokens(working), advantage=1.0))
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
#   only_restates: is it still to be worked out?          yes: False   no (3 signs, \sqrt2 has 2)
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
        if len(answer) + len(gold) > 1000 or answer == gold:
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
def check_model(model, name: str, longest: int) -> None:
    """Compares greedy sampling and packed log-probs with plain passes, up to the longest text, so
    that scaled logits, attention windows, recurrence and the like show up. Raises UserError."""
    with blame(f"{name}: cannot be trained so; Llama and Qwen models can"), torch.no_grad():
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", longest)
        assert longest <= limit, f"{limit} positions, texts of {longest}: lower --max_new_tokens"
        size = model.get_input_embeddings().num_embeddings
        tokens = random.Random(0).choices(range(size), k=max(longest, 5))
        prompts = [tokens[:3], tokens[:3], tokens[4:]]  # shared by two, and as long as may be
        sampled = rollout(model, prompts, 1, max_new_tokens=4, temperature=0, eos_token_id=-1,
                          pad_token_id=0)
        packed, _ = response_logprobs(model, prompts, [response for [response] in sampled])
        for prompt, [response], row in zip(prompts, sampled, packed):
            ids = torch.tensor([prompt + response], device=model.device)
            best = model(ids, logits_to_keep=5).logits[0, :-1].log_softmax(-1).amax(-1)  # (4,)
            error = (row - best).abs().max().item()
            assert error < 1e-3, f"log-probs of sampled tokens are wrong by {error:.2g}"


# ---- Run folders ---------------------------------------------------------------------------------
@contextmanager
def written_whole(path: str | Path):
    """Gives a path to write to, which then replaces path: a crash leaves nothing half written."""
    path, unfinished = Path(path), Path(f"{path}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    with blame(f"{unfinished}: not written; make room"):
        yield unfinished
    shutil.rmtree(path, ignore_errors=True)  # a folder; a file is replaced as it is
    os.replace(unfinished, path)


def write_rows(path: str | Path, rows: list[dict]) -> None:
    """Writes a JSON line a row, the whole file or nothing."""
    with written_whole(path) as unfinished:
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))


def saved_rows(path: Path) -> list[dict]:
    """What write_rows wrote, nothing if there is no such file. Raises UserError if damaged."""
    return [row for _, row in read_rows(path)] if path.exists() else []


def open_folder(command: str, config: Config) -> dict:
    """Makes a run's folder, or goes on with it; returns its summary, {} if it is unfinished. Raises
    UserError if it holds anything else, or results with other settings."""
    out, settings = Path(config.out), {"command": command, **asdict(config)}
    out.mkdir(parents=True, exist_ok=True)
    found = {file.name for file in out.iterdir()} - {"lock", "config.json.partial"}
    old = (saved_rows(out / "config.json") or [{}])[0]
    if found and set(old) != set(settings):
        raise UserError(f"{out}: holds something else than a run; give another --out")
    with blame(f"{out}: another run is using it; wait, or give another --out"):
        lock = os.open(out / "lock", os.O_CREAT | os.O_RDWR)  # never closed: held until the end
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    free = {"out", "device", "threads", "sample_rows", "micro_tokens", "save_every"}  # rounding
    free |= set() if command == "collect" else {"collect_k", "collect_temperature", "collect_top_p"}
    free |= set() if config.pool else {"replays", "replay_failed", "sft_steps"}
    changed = [name for name, now in settings.items() if name not in free and now != old.get(name)
               and not (old and isinstance(now, str)  # data, base and pool may have moved along
               and os.path.relpath(f"{now}/", out) == os.path.relpath(f"{old[name]}/", old["out"]))]
    if changed and found & {"metrics.jsonl", "collected.jsonl", "base", "vanilla"}:
        raise UserError(f"{out}: was run with --{changed[0]} {old[changed[0]]}; give another --out")
    write_rows(out / "config.json", [settings])
    summary = (saved_rows(out / "summary.json") or [{}])[0]
    print(f"{out}: {'is finished' if summary else 'is under way'}")
    return summary


# ---- Comparing runs ------------------------------------------------------------------------------
def over_seeds(values: list[float]) -> tuple[float, float]:
    """The mean over seeds, and half its 95% interval (Student's t; 0 for one seed)."""
    t95 = [0.0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # for 1 to 10 seeds
    t = t95[min(len(values), 10) - 1]
    return float(np.mean(values)), t * float(np.std(values)) / max(1, len(values) - 1)**0.5


def compare(runs: list[Path], out: Path) -> str:
    """Draws the arms' curves into OUT/curves.png; returns a Markdown table of the arms."""
    from matplotlib.figure import Figure
    arms = {}  # {arm: {seed: summary}}; a folder of `run` counts as its two arms
    for path in runs:
        for part in (path / "vanilla", path / "rlep") if (path / "rlep").exists() else [path]:
            with blame(f"{part}: no finished run of train; finish it, or leave it out"):
                [summary] = saved_rows(part / "summary.json")
                arm = arms.setdefault(f"{summary['arm']}, {summary['step']} steps", {})
                assert summary["seed"] not in arm, "or a second one of its arm and seed"
                arm[summary["seed"]] = summary
    base = next((arms[name] for name in arms if name.startswith("vanilla RL")), {})
    axis = Figure(figsize=(8, 4), layout="constrained").subplots()
    lines = ["| arm (seeds) | mean@k, % | minus vanilla RL | pass@k, % |", "|---" * 4 + "|"]
    for name, seeds in arms.items():
        curves = [dict(summary["curve"]) for summary in seeds.values()]
        steps = [step for step in curves[0] if all(step in curve for curve in curves)]
        points = [over_seeds([100 * curve[step] for curve in curves]) for step in steps]
        middle, half = np.transpose(points)
        [line] = axis.plot(steps, middle, marker=".", label=name)
        axis.fill_between(steps, middle - half, middle + half, color=line.get_color(), alpha=0.15)
        gains = [100 * (seeds[seed]["mean_at_k"] - base[seed]["mean_at_k"])
                 for seed in seeds if seed in base]
        columns = [[100 * summary["mean_at_k"] for summary in seeds.values()], gains,
                   [100 * summary["pass_at_k"] for summary in seeds.values()]]
        cells = ["{:.2f} ± {:.2f}".format(*over_seeds(x)) if x else "-" for x in columns]
        lines.append(f"| {name} ({len(seeds)}) | {' | '.join(cells)} |")
    axis.set(xlabel="step", ylabel="held-out accuracy, mean@k (%)")
    out.mkdir(parents=True, exist_ok=True)
    axis.figure.legend(loc="outside upper center", ncols=2)
    axis.figure.savefig(out / "curves.png", dpi=120)
    return "\n".join(lines)


# ---- The command line ----------------------------------------------------------------------------
def parse(argv: list[str] | None) -> tuple[str, list[Path], Config]:
    """The command, the folders to plot, the settings; a bad flag ends with one line, status 2."""
    parser = argparse.ArgumentParser("rlep.py", argparse.SUPPRESS, __doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="run",
                        choices=["run", "train", "collect", "eval", "plot"])
    parser.add_argument("runs", nargs="*", type=Path, help="for plot: folders of finished runs")
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)", Path(__file__).read_text(), re.M))
    for flag in fields(Config):
        parser.add_argument(f"--{flag.name}", type=flag.type, default=flag.default,
                            metavar="VALUE", help=f"{comments[flag.name]} [{flag.default}]")
    values = vars(parser.parse_intermixed_args(argv))
    command, runs = values.pop("command"), values.pop("runs")
    zero = ("seed bf16 threads train_size replays replay_failed sft_steps lr_warmup_steps clip_low "
            "clip_high dual_clip overlong_buffer" + " temperature" * (command == "eval")).split()
    for name, value in values.items():
        if not (isinstance(value, str) or 0 < value < 1e12 or value == 0 and name in zero):
            parser.error(f"--{name} {value}: must be above 0{', or 0' * (name in zero)}")
    config = Config(**values)
    if (command == "plot") != bool(runs):
        parser.error("plot, and only plot, takes folders of finished runs")
    if config.pool and command != "train" or config.sft_steps and not config.pool:
        parser.error("--pool: for train, and needed with --sft_steps")
    if command in ("collect", "eval") and not config.model:
        parser.error(f"{command}: needs --model, the policy to ask")
    paths = [Path(path).name for path in (config.model, config.data, config.pool) if path]
    config.out = config.out or f"runs/{'-'.join([command, *paths])}-seed{config.seed}"
    return command, runs, config


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    transformers.utils.logging.disable_progress_bar()
    command, runs, config = parse(argv)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    try:
        if command == "plot":
            print(compare(runs, Path(config.out)))
        elif command == "run":
            run(config, *load_problems(config))
        elif command == "train":
            train(config, *load_problems(config))
        elif command == "collect":
            collect(config, load_problems(config)[0])
        else:
            held_out = load_problems(config)[1]
            evaluate(Policy(config, held_out), held_out, config, config.model)
        return 0
    except (UserError, OSError, ImportError) as error:
        message, status = "error: " + " ".join(str(error).split()), 2
    except torch.OutOfMemoryError:
        message, status = "error: out of memory; lower --sample_rows and --micro_tokens", 2
    except KeyboardInterrupt:
        message, status = "stopped; the same command goes on from what is saved", 130
    print("rlep.py:", message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
