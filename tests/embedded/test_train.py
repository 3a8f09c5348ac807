"""How the embedded models are trained: what a PRM starts from."""

import itertools
from dataclasses import replace

import torch
from transformers import Qwen2ForCausalLM

from tts_engine.embedded import model_path
from tts_engine.embedded.corpus import FIRST_ERROR, GOOD, LATER_ERROR, RIGHT_DIGIT, WRONG_DIGIT, arithmetic_drill
from tts_engine.embedded.recipe import ADDED_LAYERS, STUDY_PRMS
from tts_engine.embedded.train import balanced_loss, train_prm, with_added_layers
from tts_engine.models.tokenizer import load_tokenizer


def test_added_layers_stand_on_the_policy_and_look_one_token_back():
    directory = model_path("policy-m")
    tokenizer = load_tokenizer(directory)
    policy, grown = (
        Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager") for _ in range(2)
    )
    ids = torch.tensor([tokenizer("a=47+38;b=6*9;c=a-b;c?\na=47+38=85\n\n")["input_ids"]])
    with torch.inference_mode():
        ref = policy.model(input_ids=ids, output_hidden_states=True).hidden_states
        logits = policy(input_ids=ids).logits[0]
        model = with_added_layers(grown, tokenizer)
        model.set_attn_implementation("eager")
        out = model.model(input_ids=ids, output_hidden_states=True, output_attentions=True)
        depth = len(policy.model.layers)
        assert len(out.attentions) == depth + ADDED_LAYERS
        assert all(torch.equal(a, b) for a, b in zip(out.hidden_states[:depth], ref, strict=False))
        look = out.attentions[depth][0, 0]
        assert look[1:].argmax(-1).tolist() == list(range(ids.shape[1] - 1))
        assert look[1:].max(-1).values.min() > 0.5
        # what it reads there: the policy's logits of the ten digits, up to the scale
        first = model.model.layers[depth]
        read = first.self_attn.v_proj(first.input_layernorm(out.hidden_states[depth]))[0, :, :10]
    digits = tokenizer.convert_tokens_to_ids([*"0123456789"])
    torch.testing.assert_close(read, 0.3 * logits[:, digits], rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is grown.model.embed_tokens.weight


def test_every_kind_of_target_weighs_the_same_however_rare():
    logits = torch.tensor([[0.0, 2.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    right, wrong = torch.nn.functional.softplus(torch.tensor([-2.0, 2.0])).tolist()
    loss = balanced_loss(logits, torch.tensor([GOOD, GOOD, GOOD, FIRST_ERROR]))
    torch.testing.assert_close(loss.item(), right + wrong)
    loss = balanced_loss(logits, torch.tensor([WRONG_DIGIT, RIGHT_DIGIT, LATER_ERROR, RIGHT_DIGIT]))
    torch.testing.assert_close(loss.item(), wrong + right + 0.25 * wrong)


def test_a_checkpoint_is_saved_on_the_way_and_changes_nothing(tmp_path):
    recipe = replace(STUDY_PRMS["prm-small"], legs=((2000, 1e-3), (2000, 1e-3), (2000, 1e-3)))
    drill = list(itertools.islice(arithmetic_drill(1), 100))
    saved = {name: tmp_path / name for name in ("half", "whole", "alone")}
    for name, checkpoints in (("alone", {}), ("whole", {3000: saved["half"]})):
        saved[name].mkdir()
        train_prm(recipe, model_path(recipe.start), drill, drill, saved[name], lambda line: None, checkpoints)
    half, whole, alone = ((saved[name] / "model.safetensors").read_bytes() for name in ("half", "whole", "alone"))
    assert whole == alone and len(half) == len(whole) and half != whole
    assert {path.name for path in saved["half"].iterdir()} == {path.name for path in saved["whole"].iterdir()}
