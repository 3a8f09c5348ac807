"""Trains the embedded policies and PRMs from nothing, with transformers' own modules, on the CPU."""

import itertools
import json
import math
import random
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..models.tokenizer import load_tokenizer
from ..prm.families import FAMILIES
from ..prm.spec import TokenPair
from ..tasks.problems import load_task
from .check import publish
from .corpus import (FIRST_ERROR, GOOD, IGNORE, LATER_ERROR, Trajectory, batches, corrupted_gold, labelled, labelled_rows, solved_rows,
                     training_programs)  # fmt: skip
from .recipe import BATCH_TOKENS, POLICIES, PRMS, SAMPLES, PolicyRecipe, PRMRecipe
from .tokenizer import build_tokenizer, save_tokenizer

# Each class of steps weighs the same in every batch, however rare; what follows a first error teaches little.
CLASS_WEIGHTS = {FIRST_ERROR: 1.0, GOOD: 1.0, LATER_ERROR: 0.25}


def qwen2_config(recipe: PolicyRecipe, vocab_size: int):
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        max_position_embeddings=512,
        initializer_range=0.64 * recipe.hidden_size**-0.5,  # 0.02, made for wide models, leaves narrow ones on a plateau for millions of tokens
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


def fit(step_loss, parameters, stream, *, total_tokens: int, learning_rate: float, name: str, log) -> None:
    """AdamW with warm-up and a cosine to a tenth, clipped at 1; `step_loss(ids, targets)` -> scalar."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    warmup = 0.02 * total_tokens
    spent, steps, started, recent = 0, 0, time.monotonic(), []
    for ids, targets, real in stream:
        progress = min(1.0, spent / total_tokens)
        rate = learning_rate * min(1.0, (spent + BATCH_TOKENS) / warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = step_loss(ids, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        spent, steps = spent + real, steps + 1
        recent.append(loss.item())
        if steps % 100 == 0:
            seconds = time.monotonic() - started
            log(f"{name}: {spent / 1e6:.2f} of {total_tokens / 1e6:.1f} M tokens, loss {sum(recent) / len(recent):.4f}, "
                f"{spent / seconds:,.0f} tokens/s, {seconds:.0f} s")  # fmt: skip
            recent.clear()


def train_policy(recipe: PolicyRecipe, directory: Path, log=print) -> None:
    """Train one policy and save it as a Hugging Face directory of bfloat16 weights."""
    from transformers import Qwen2ForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(recipe.seed)
    model = Qwen2ForCausalLM(qwen2_config(recipe, tokenizer.get_vocab_size()))

    def step_loss(ids, targets):
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    for leg, (tokens, learning_rate) in enumerate(recipe.legs):
        seed = recipe.seed + 1000 * leg
        stream = batches(solved_rows(tokenizer, seed), batch_tokens=BATCH_TOKENS, total_tokens=tokens, seed=seed)
        fit(step_loss, model.parameters(), stream, total_tokens=tokens, learning_rate=learning_rate, name=recipe.name, log=log)
        model.to(torch.bfloat16).to(torch.float32)
    model.to(torch.bfloat16).save_pretrained(directory)
    save_tokenizer(directory)



def train_prm(recipe: PRMRecipe, start: Path, trajectories: Iterable[Trajectory], directory: Path, log=print) -> None:
    """Train one PRM from the policy in `start` and save it in its family's form; classes weigh alike however rare they are."""
    from transformers import Qwen2ForCausalLM

    save_tokenizer(directory)
    tokenizer = load_tokenizer(directory)
    spec = FAMILIES[recipe.family].bind(tokenizer)
    torch.manual_seed(recipe.seed)
    model = Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32)
    width = model.config.hidden_size
    score = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
    two_class = not isinstance(spec.readout, TokenPair)
    parameters = [*model.parameters(), *(score.parameters() if two_class else ())]

    def step_loss(ids, targets):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        at = targets != IGNORE
        kinds, hidden = targets[at], hidden[at]
        if two_class:
            logits = score(hidden)
        else:
            logits = hidden @ model.get_input_embeddings().weight[[spec.readout.minus, spec.readout.plus]].T
        losses = torch.nn.functional.cross_entropy(logits, (kinds == GOOD).long(), reduction="none")
        share = [losses[kinds == kind].mean() * weight for kind, weight in CLASS_WEIGHTS.items() if (kinds == kind).any()]
        return torch.stack(share).sum()

    stream = batches(labelled_rows(spec, trajectories), batch_tokens=BATCH_TOKENS, total_tokens=recipe.tokens, seed=recipe.seed)
    fit(step_loss, parameters, stream, total_tokens=recipe.tokens, learning_rate=recipe.learning_rate, name=recipe.name, log=log)
    model.to(torch.bfloat16)
    if two_class:
        tensors = {f"model.{name}": tensor for name, tensor in model.model.state_dict().items()}
        tensors |= {f"score.{name}": tensor.to(torch.bfloat16) for name, tensor in score.state_dict().items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
        model.config.architectures = ["Qwen2ForProcessRewardModel"]
        model.config.save_pretrained(directory)
    else:
        model.config.prm_family = recipe.family  # the tensors alone look like any causal LM
        model.save_pretrained(directory)


@torch.inference_mode()
def sample_trajectories(policy: Path, file: Path, *, programs: int, draws: int, temperature: float, seed: int, log=print) -> None:
    """Write what `policy` answers to fresh training programs, with labels, as JSONL (one trajectory a line)."""
    from transformers import Qwen2ForCausalLM

    tokenizer = load_tokenizer(policy)
    tokenizer.padding_side = "left"
    model = Qwen2ForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    chosen = sorted(itertools.islice(training_programs(seed), programs), key=lambda program: len(program.text))
    lines, started = [], time.monotonic()
    for first in range(0, programs, 128):
        group = chosen[first : first + 128]
        inputs = tokenizer([program.text + "\n" for program in group], return_tensors="pt", padding=True)
        longest = inputs["input_ids"].shape[1]
        outputs = model.generate(**inputs, do_sample=True, temperature=temperature, top_k=0, num_return_sequences=draws,
                                 max_new_tokens=160)  # fmt: skip
        for i, text in enumerate(tokenizer.batch_decode(outputs[:, longest:], skip_special_tokens=True)):
            steps = [step for step in text.split("\n\n") if step.strip()]
            trajectory = labelled(group[i // draws], steps)
            lines.append(json.dumps([trajectory.problem, trajectory.steps, trajectory.labels]))
        if first // 128 % 10 == 0:
            log(f"{file.stem}: {len(lines)} trajectories, {time.monotonic() - started:.0f} s")
    random.Random(seed).shuffle(lines)
    partial = file.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n")
    partial.rename(file)


def sampled(files: list[Path]) -> Iterable[Trajectory]:
    """The trajectories of several sample files, in turn, over and over."""
    columns = [file.read_text().splitlines() for file in files]
    lines = [line for row in itertools.zip_longest(*columns) for line in row if line is not None]
    for problem, steps, labels in map(json.loads, itertools.cycle(lines)):
        yield Trajectory(problem, tuple(steps), tuple(labels))


def train_all(out: Path, work: Path, log=print) -> None:
    """Remake every model that `out` lacks, in two single-threaded processes (a 2-core machine's best use)."""
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        lanes = [pool.submit(_run_stages, stages, out, work) for stages in
                 (["policy-l", "prm-poor"], ["policy-s", "policy-m", "samples", "prm-good"])]  # fmt: skip
        for lane in lanes:
            lane.result()
    publish(out, load_task("embedded", "calibration"), log)
    log(f"the embedded models are in {out}")


def _run_stages(stages: list[str], out: Path, work: Path) -> None:
    torch.set_num_threads(1)
    for stage in stages:
        with open(work / f"{stage}.log", "a") as file:

            def log(line: str, file=file) -> None:
                print(line, file=file, flush=True)

            if stage == "samples":
                for policy, seed in zip(SAMPLES["policies"], itertools.count(100)):
                    file_out = work / f"{policy}.jsonl"
                    if not file_out.exists():
                        sample_trajectories(out / policy, file_out, programs=SAMPLES["programs"], draws=SAMPLES["draws"],
                                            temperature=SAMPLES["temperature"], seed=seed, log=log)  # fmt: skip
                continue
            if (out / stage).exists():
                continue
            partial = work / stage
            partial.mkdir(exist_ok=True)
            if stage in POLICIES:
                train_policy(POLICIES[stage], partial, log)
            else:
                recipe = PRMS[stage]
                while not (out / recipe.start).exists():
                    time.sleep(1)
                if recipe.trained_on == "samples":
                    trajectories = sampled([work / f"{policy}.jsonl" for policy in SAMPLES["policies"]])
                else:
                    trajectories = corrupted_gold(recipe.seed)
                train_prm(recipe, out / recipe.start, trajectories, partial, log)
            partial.rename(out / stage)
