"""Trains the embedded policies and PRMs from nothing, with transformers' own modules, on the CPU."""

import math
import time
from pathlib import Path

import torch

from .corpus import IGNORE, batches, solved_rows
from .recipe import POLICIES, PolicyRecipe
from .tokenizer import build_tokenizer, save_tokenizer


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
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


def fit(step_loss, parameters, stream, *, total_tokens: int, batch_tokens: int, learning_rate: float, name: str, log) -> None:
    """AdamW with warm-up and a cosine to a tenth, clipped at 1; `step_loss(ids, targets)` -> scalar."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    warmup = 0.02 * total_tokens
    spent, steps, started, recent = 0, 0, time.monotonic(), []
    for ids, targets, real in stream:
        progress = min(1.0, spent / total_tokens)
        rate = learning_rate * min(1.0, (spent + batch_tokens) / warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = step_loss(ids, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        spent, steps = spent + real, steps + 1
        recent.append(loss.item())
        if steps % 50 == 0:
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
    compiled = torch.compile(model, dynamic=True)

    def step_loss(ids, targets):
        logits = compiled(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    stream = batches(solved_rows(tokenizer, recipe.seed), batch_tokens=recipe.batch_tokens, total_tokens=recipe.tokens,
                     pad_target=IGNORE, seed=recipe.seed)  # fmt: skip
    fit(step_loss, model.parameters(), stream, total_tokens=recipe.tokens, batch_tokens=recipe.batch_tokens,
        learning_rate=recipe.learning_rate, name=recipe.name, log=log)  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(directory)
    save_tokenizer(directory)


if __name__ == "__main__":
    import sys
    from dataclasses import replace

    torch.set_num_threads(1)
    name, tokens, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    train_policy(replace(POLICIES[name], tokens=tokens), out, log=lambda s: print(s, flush=True))
