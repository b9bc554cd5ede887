"""From a recipe to a model: shapes, methods, policies, and one sentence for what cannot be built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, GPT2LMHeadModel, LlamaForCausalLM, XLMConfig, XLMWithLMHeadModel

from lorank.layers import LowRankLinear
from lorank.loss import next_token_loss
from lorank.train.data import collate, load_tokenizer
from lorank.train.model import build_config, build_model, check_causal, check_separate, warn_of_weights
from lorank.train.recipe import Recipe


def build(**settings: Any) -> Any:
    recipe = Recipe(**{"vocab_size": 300, **settings})
    with torch.device("meta"):
        return build_model(recipe, build_config(recipe))


def test_a_size_brings_its_rank() -> None:
    layers = [module for module in build(size="60m").modules() if isinstance(module, LowRankLinear)]
    assert len(layers) == 8 * 7 and {layer.A.out_features for layer in layers} == {128}


def test_entries_of_the_configuration_can_be_changed() -> None:
    assert build(model="gpt2", method="dense", shape={"n_layer": 2}).config.n_layer == 2
    with pytest.raises(ValueError, match="shape: a configuration of type 'gpt2' has no entry 'layers'"):
        build(model="gpt2", shape={"layers": 2})
    with pytest.raises(ValueError, match="shape.hidden_size cannot be 'abc': .*int"):
        build(size="60m", shape={"hidden_size": "abc"})


TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("attention_dropout", -0.5, "cannot be run"),  # which shows in training only
        ("attention_dropout", 2, "cannot be run: dropout probability has to be between 0 and 1"),
        ("hidden_act", "evil", "can be built with .*: hidden_act cannot be 'evil'"),
        ("rope_parameters", {"rope_type": "evil"}, "can be built with .*: rope_parameters cannot be"),
        ("num_attention_heads", 0, "does not suit model type 'llama'"),
        ("num_attention_heads", 3, r"does not suit .* \(16\) is not a multiple of .* heads \(3\)"),
        ("num_hidden_layers", 0, "the number of layers must be at least 1, got 0"),
        ("intermediate_size", 0, "its weight model.layers.0.mlp.gate_proj.weight would have no entries"),
        ("dtype", "evil", "shape.dtype cannot be changed, .* got 'evil'; use precision"),
        ("model_type", "gpt2", "use model"),
        ("eos_token_id", 99999, "shape.eos_token_id cannot be changed, .* got 99999; use tokenizer"),
        ("return_dict", False, "shape.return_dict cannot be changed"),
        ("to_dict", 3, "has no entry 'to_dict'"),
        ("_attn_implementation", "eager", "has no entry '_attn_implementation'"),
    ],
)
def test_a_value_that_suits_no_model_is_named(entry: str, value: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TINY}))
    recipe = Recipe(model=str(tmp_path / "config.json"), method="dense", vocab_size=300, shape={entry: value})
    with pytest.raises(ValueError, match=words) as refusal:
        check_causal(build_model(recipe, build_config(recipe)), recipe.shape)
    assert f"shape.{entry}" in str(refusal.value) or "no entry" in words
    assert "\n" not in str(refusal.value)


def test_lists_of_blocks_follow_their_number(tmp_path: Path) -> None:
    """Else the configuration could not be saved at the end of the run."""
    kinds = ["sliding_attention", "full_attention"]
    for shape, found in (
        ({"num_hidden_layers": 3}, ["sliding_attention"] * 3),
        ({"num_hidden_layers": 2, "layer_types": kinds}, kinds),
    ):
        config = build_config(Recipe(model="gemma3_text", vocab_size=300, shape=shape))
        assert config.layer_types == found
        config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="shape.layer_types=.* does not suit model type 'gemma3_text'"):
        build_config(Recipe(model="gemma3_text", shape={"layer_types": kinds}))


def test_positions_that_begin_after_the_padding_id_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta", "max_position_embeddings": 64, **TINY}))
    recipe = Recipe(model=str(tmp_path / "config.json"), method="dense")
    config = build_config(recipe, load_tokenizer("bytes"))
    with pytest.raises(
        ValueError, match=f"max_position_embeddings must be above the padding id {config.pad_token_id}, .* 64"
    ):
        build_model(recipe, config)


def test_a_model_is_a_type_a_file_or_a_folder(tmp_path: Path) -> None:
    shape = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "intermediate_size": 64}))
    for model in (tmp_path, tmp_path / "config.json"):
        built = build(model=str(model), method="dense")
        assert type(built) is LlamaForCausalLM and built.config.hidden_size == 32 and built.config.vocab_size == 300
    assert type(build(model="gpt2", method="dense")) is GPT2LMHeadModel


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"hidden_size": 50, "num_attention_heads": 4}, "not a multiple of the number of attention heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_act": "nothing", "hidden_size": 32, "num_attention_heads": 4}, "nothing"),
    ],
)
def test_a_senseless_configuration_is_one_sentence(shape: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1, **shape}))
    with pytest.raises(ValueError, match=words) as refusal:
        build(model=str(tmp_path / "config.json"))
    assert "\n" not in str(refusal.value)


def test_attention_that_a_model_lacks_is_refused() -> None:
    """transformers' own sentence names a speech model and an argument that we do not have."""
    with pytest.raises(ValueError, match="no attention=flex_attention for it; use attention=eager$"):
        build(model="gptj", method="dense", attention="flex_attention")
    for attention in ("sdpa", "eager"):  # the first is the default, and means: where there is one
        assert build(model="gptj", method="dense", attention=attention).config._attn_implementation == "eager"


def test_precision_decides_the_type_of_the_weights() -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.float32), ("bf16-pure", torch.bfloat16)):
        assert {p.dtype for p in build(precision=precision).parameters()} == {dtype}


def test_checkpoint_every_uses_the_methods_own_policy() -> None:
    model = build(size="20m", method="cola-m", checkpoint_every=2)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False, True, False]
    assert all(layer.gradient_checkpointing for layer in build(size="20m", method="cola-m").model.layers)
    assert not build(method="cola-m", checkpoint="none").is_activation_checkpointing
    for method in ("cola", "dense"):
        with pytest.raises(ValueError, match="checkpoint_every=2 needs a checkpoint policy"):
            build(method=method, checkpoint_every=2)


def test_dense_refuses_what_it_would_ignore() -> None:
    for setting in ({"targets": ["q"]}, {"exclude": ["q"]}):
        for optimizer in ("adamw", "muon"):
            with pytest.raises(
                ValueError, match="dense converts no layer and projects no gradient; leave out targets and exclude"
            ):
                build(method="dense", optimizer=optimizer, **setting)


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "electra", "gpt2", "opt", "gpt_neox", "qwen3", "mistral", "phi3", "glm4"]
)
def test_no_position_sees_what_comes_next(kind: str, tmp_path: Path) -> None:
    """Also of the encoders, and with the special tokens of vocabularies larger than ours."""
    shape = {
        "model_type": kind,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    keys = {"num_key_value_heads": 2, "head_dim": 8, "n_embd": 32, "n_layer": 1, "n_head": 4, "ffn_dim": 64}
    (tmp_path / "config.json").write_text(
        json.dumps({**shape, **keys, "word_embed_proj_dim": 32, "embedding_size": 32})
    )
    recipe = Recipe(model=str(tmp_path / "config.json"), vocab_size=300, sequence_length=32)
    model = build_model(recipe, build_config(recipe))
    check_causal(model)
    ids = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, -1] = 5
    with torch.no_grad():
        one, other = (model.eval()(input_ids=x).logits[:, :-1] for x in (ids, changed))
    torch.testing.assert_close(one, other)


def test_a_model_that_sees_the_future_is_refused() -> None:
    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    model = BertLMHeadModel(BertConfig(**shape))
    with pytest.raises(ValueError, match="'bert' sees the tokens it should predict"):
        check_causal(model.train())
    assert model.training
    check_causal(BertLMHeadModel(BertConfig(**shape, is_decoder=True)))
    small = {"vocab_size": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 4}  # its padding, id 2, is hidden by the mask
    check_causal(XLMWithLMHeadModel(XLMConfig(**small, causal=True)))
    with pytest.raises(ValueError, match="'xlm' sees the tokens it should predict"):
        check_causal(XLMWithLMHeadModel(XLMConfig(**small, causal=False)))


def test_an_integer_is_a_number_too(tmp_path: Path) -> None:
    entries = {"router_aux_loss_coef": 0, "initializer_range": 0, "rms_norm_eps": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", **entries}))
    by_file = build_config(Recipe(model=str(tmp_path)))
    for config in (by_file, build_config(Recipe(model="mixtral", shape=entries))):
        for name, value in entries.items():
            assert getattr(config, name) == value and isinstance(getattr(config, name), float)
    with pytest.raises(ValueError, match="shape.router_aux_loss_coef cannot be True"):
        build_config(Recipe(model="mixtral", shape={"router_aux_loss_coef": True}))


def test_what_a_class_computes_is_a_leftover(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "use_return_dict": False}))
    assert build_config(Recipe(model=str(tmp_path))).return_dict is True


def test_entries_of_rotary_positions_keep_the_others() -> None:
    def table(model: str, **shape: Any) -> Any:
        return build_config(Recipe(model=model, shape=shape)).rope_parameters

    assert table("llama", rope_theta=500000) == {"rope_type": "default", "rope_theta": 500000.0}
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}
    assert table("llama", rope_theta=500000, rope_scaling={"rope_type": "linear", "factor": 2}) == scaled
    assert table("llama", rope_scaling={"rope_type": "linear", "factor": 2}, rope_theta=500000) == scaled
    half = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert table("gpt_neox", rotary_pct=0.5) == table("gpt_neox", partial_rotary_factor=0.5) == half
    with pytest.raises(ValueError, match="^shape.rope_theta must be a positive number, got 'high'$"):
        table("llama", rope_theta="high")
    with pytest.raises(
        ValueError, match="^shape.rope_theta has one value for .* set shape.rope_parameters, which is {"
    ):
        table("gemma3_text", rope_theta=500000)
    with pytest.raises(ValueError, match="has no entry 'rope_theta'"):
        table("gpt2", rope_theta=500000)


def test_messages_name_the_architecture_of_a_converted_model() -> None:
    model = build_model(recipe := Recipe(vocab_size=300, size="tiny", rank=4), build_config(recipe))
    assert model.config.model_type == "lorank_llama"
    model.get_input_embeddings().weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="^a model of type 'llama' gives numbers that are not finite"):
        check_causal(model)


def test_weights_of_a_folder_are_not_dropped_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A name on the hub has weights too; a type, a configuration and a folder without weights have none."""
    model = LlamaForCausalLM(build_config(Recipe(size="tiny", vocab_size=300, shape={"num_hidden_layers": 1})))
    model.config.save_pretrained(tmp_path / "shape")
    model.save_pretrained(tmp_path / "trained")
    for name in (None, "gpt2", str(tmp_path / "shape"), str(tmp_path / "trained/config.json")):
        warn_of_weights(name)
    assert not caplog.messages
    for name in (str(tmp_path / "trained"), "owner/model"):
        warn_of_weights(name)
        said = f"only the configuration of model={name} is used: training starts from new weights, not from its own"
        assert caplog.messages.pop() == said
        caplog.clear()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_separate_documents_share_only_a_row(kind: str, attention: str) -> None:
    """Logits and loss of a batch of packed rows are those of each document alone."""
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2} if kind == "gpt2" else {**TINY, "num_key_value_heads": 2}
    recipe = Recipe(model=kind, shape=shape, vocab_size=60, attention=attention, rank=4)
    model = build_model(recipe, build_config(recipe)).eval()
    check_separate(model)
    rows = [[5, 6, 7, 0, 9, 10, 11, 0, 20, 21], [0, 40, 41, 0, 43, 44, 45, 46, 47, 0]]
    alone = [[5, 6, 7, 0], [9, 10, 11, 0], [20, 21], [0], [40, 41, 0], [43, 44, 45, 46, 47, 0]]
    batch = collate([{"input_ids": row} for row in rows], 60, end=0)
    with torch.no_grad():
        each = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in alone])
        torch.testing.assert_close(
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits.flatten(0, 1), each
        )
        nats = [
            -each.log_softmax(-1)[start + i, ids[i + 1]]
            for ids, start in zip(alone, (0, 4, 8, 10, 11, 14), strict=True)
            for i in range(len(ids) - 1)
        ]
        torch.testing.assert_close(next_token_loss(model, batch).nats, torch.stack(nats).mean())


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (
            "opt",
            {
                "hidden_size": 16,
                "word_embed_proj_dim": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "ffn_dim": 16,
            },
        ),
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 1}),
        ("bert", TINY),
    ],
)
def test_models_that_would_mix_documents_are_refused(kind: str, shape: dict[str, Any]) -> None:
    recipe = Recipe(model=kind, shape=shape, vocab_size=60, method="dense", sequence_length=16)
    words = f"documents must be packed or padded with a model of type '{kind}', .*see the documents before its own"
    with pytest.raises(ValueError, match=words):
        check_separate(build_model(recipe, build_config(recipe)))


def test_positions_that_do_not_begin_anew_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(model="gpt2", shape={"n_embd": 16, "n_layer": 1, "n_head": 2}, vocab_size=60, method="dense")
    model = build_model(recipe, build_config(recipe))
    before = model.transformer.wpe.forward
    monkeypatch.setattr(model.transformer.wpe, "forward", lambda places: before(torch.arange(places.shape[1])[None]))
    with pytest.raises(ValueError, match="got separate: its positions would not begin anew with each document"):
        check_separate(model)
