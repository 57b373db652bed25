"""Models as they are loaded: no dropout, no settings of their own, all their end tokens; and prompts as tokens."""

import json
from pathlib import Path

import pytest
import torch
from helpers import TOKENIZER, tiny_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import plumbing.models
from plumbing.errors import UserError
from plumbing.models import encode, end_token_ids, load_model, tokenize_problems
from tasks import Problem

MESSAGES = [{"role": "system", "content": "Hi"}, {"role": "user", "content": "1+2="}]
ENDS = [1, 30, 50, 66]


def saved(folder, tokenizer, model=None, **generation_config):
    """A model's folder, with this generation_config.json if any is given."""
    (model or tiny_model()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if generation_config:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return str(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------

SHORT = [1.0] * 4  # factors for each of the 4 frequencies of a head of width 8
DYNAMIC = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
LONGROPE = dict(
    rope_type="longrope",
    factor=2.0,
    rope_theta=1e4,
    short_factor=SHORT,
    long_factor=[4.0] * 4,
    original_max_position_embeddings=32,
)


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=lambda rope: rope["rope_type"])
def test_positions_that_depend_on_the_batch_are_refused(rope, tokenizer, tmp_path):
    """Keys turned when a row was short meet queries of a long one: 2 to 3 nats between sampler and trainer."""
    path = saved(tmp_path / "model", tokenizer, tiny_model("llama", rope_parameters=rope))
    with pytest.raises(UserError, match=f"LlamaForCausalLM: rope_type {rope['rope_type']}"):
        load_model(path, "cpu")


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_other_positions_are_accepted(kind, tokenizer, tmp_path):
    """They turn a token by its own position only. Qwen and Llama use them to reach longer contexts."""
    rope = dict(rope_type=kind, factor=2.0, rope_theta=1e4, original_max_position_embeddings=64)
    if kind == "llama3":
        rope |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
    load_model(saved(tmp_path / "model", tokenizer, tiny_model("llama", rope_parameters=rope)), "cpu")


def test_blocks_without_keys_and_values_are_refused(tokenizer, tmp_path):
    """Hybrids with linear attention load well, and end in a traceback when the first token is sampled."""
    model = tiny_model(
        "qwen3_next",
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    assert "linear_attention" in model.config.layer_types
    path = saved(tmp_path / "model", tokenizer, model)
    with pytest.raises(UserError, match="linear_attention"):
        load_model(path, "cpu")


def without(name):
    """A change to weights: one tensor less."""
    return lambda weights: weights.pop(name)


def renamed(name, new):
    return lambda weights: weights.update({new: weights.pop(name)})


def poisoned(weights):
    weights["model.norm.weight"][3] = float("nan")


DAMAGES = [
    (without("model.layers.2.mlp.up_proj.weight"), "1 missing weights, model.layers.2.mlp.up_proj.weight"),
    (renamed("model.norm.weight", "model.last_norm.weight"), "1 missing weights, model.norm.weight"),
    (lambda weights: weights.update({"score.weight": torch.ones(2, 32)}), "1 unexpected weights, score.weight"),
    (lambda weights: weights.update({"model.norm.weight": torch.ones(5)}), "1 mismatched weights, model.norm.weight"),
    (lambda weights: weights.clear(), "[0-9]+ missing weights, lm_head.weight"),
    (poisoned, "model.norm.weight holds weights that are no finite numbers"),
]


@pytest.mark.parametrize("damage, words", DAMAGES, ids=[words[:40] for _, words in DAMAGES])
def test_weights_that_are_not_whole_are_refused(damage, words, tokenizer, tmp_path):
    """In place of a missing weight transformers puts a random one, says so in a long report, and training goes on."""
    path = saved(tmp_path / "model", tokenizer)
    file = tmp_path / "model/model.safetensors"
    weights = load_file(file)
    damage(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"--model {path}: .*{words}"):
        load_model(path, "cpu")


def test_a_tied_head_that_is_untied_by_the_config_is_refused(tokenizer, tmp_path):
    path = saved(tmp_path / "model", tokenizer)
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | dict(tie_word_embeddings=False)))
    with pytest.raises(UserError, match="1 missing weights, lm_head.weight"):
        load_model(path, "cpu")


def test_an_embedding_smaller_than_the_vocabulary_is_refused(tokenizer, tmp_path):
    """Its first row beyond the end is met in the middle of a run, as an index error."""
    with pytest.raises(UserError, match="its tokenizer has token 102, its embedding 90 rows"):
        load_model(saved(tmp_path / "model", tokenizer, tiny_model(vocab_size=90)), "cpu")


def test_a_model_without_end_token_is_refused(tokenizer, tmp_path):
    """No answer would ever end, and all of them score 0."""
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no token ends an answer"):
        load_model(saved(tmp_path / "model", tokenizer, tiny_model(eos_token_id=None)), "cpu")


def test_a_device_without_numbers_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="--device meta"):
        load_model(saved(tmp_path / "model", tokenizer), "meta")


def test_a_template_that_loops_is_stopped(tokenizer, monkeypatch):
    """A chat template is a program: three nested loops of 100,000 rounds end after the sun does."""
    loop = "{% for i in range(99999) %}"
    tokenizer.chat_template = loop * 3 + "{% endfor %}" * 3
    monkeypatch.setattr(plumbing.models, "TEMPLATE_SECONDS", 0.2)
    with pytest.raises(UserError, match="line 7: the chat template refuses it .takes longer than 0.2 seconds"):
        tokenize_problems(tokenizer, [Problem("1+2=", "3", "line 7")], 100)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_dropout_is_off_after_loading(family, tokenizer, tmp_path):
    """Dropout makes sampler, old policy and new policy three different ones; main puts the model into training mode."""
    path = saved(tmp_path / "model", tokenizer, tiny_model(family, attention_dropout=0.5))
    model, _ = load_model(path, "cpu")
    assert model.config.attention_dropout == 0.5  # the file asks for it
    assert not model.training
    ids = torch.randint(6, 90, (4, 20))
    with torch.no_grad():
        expected = model(ids).logits
        model.train()
        torch.manual_seed(0)
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)


def test_dropout_modules_are_off_after_loading(tokenizer, tmp_path, monkeypatch):
    """Families without attention_dropout have torch's own modules, whose p is as good a way to train another policy."""
    path = saved(tmp_path / "model", tokenizer)
    real = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args, **kwargs):
        model, info = real(*args, **kwargs)
        model.model.layers[0].extra = torch.nn.Dropout(0.5)
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model, _ = load_model(path, "cpu")
    assert model.model.layers[0].extra.p == 0.0


def test_a_generation_config_that_cannot_be_saved_is_replaced(tokenizer, tmp_path):
    """save_pretrained may refuse top_p beside do_sample=False: without a word before, after all the training."""
    poison = dict(do_sample=False, top_k=2, top_p=0.5, temperature=0.1, eos_token_id=ENDS[1:], max_length=3)
    model, tokenizer = load_model(saved(tmp_path / "model", tokenizer, **poison), "cpu")
    model.generation_config.validate(strict=True)  # raises ValueError, as saving a changed one would
    assert end_token_ids(model, tokenizer) == ENDS
    again = saved(tmp_path / "trained", tokenizer, model)
    assert end_token_ids(*load_model(again, "cpu")) == ENDS  # the end tokens survive


def test_a_generation_config_that_can_be_saved_stays(tokenizer, tmp_path):
    """It is the model's own and goes with the trained model; nothing here samples by it (see test_common_sample.py)."""
    config = dict(do_sample=True, top_k=2, temperature=0.5, eos_token_id=ENDS[1:])
    model, tokenizer = load_model(saved(tmp_path / "model", tokenizer, **config), "cpu")
    again, _ = load_model(saved(tmp_path / "trained", tokenizer, model), "cpu")
    for loaded in (model, again):
        found = loaded.generation_config
        assert (found.do_sample, found.top_k, found.temperature) == (True, 2, 0.5)


@pytest.mark.parametrize("of_model, expected", [(None, [1]), (50, [1, 50]), ([50, 30, 1], [1, 30, 50])])
def test_end_tokens_are_the_models_and_the_tokenizers(of_model, expected, tokenizer):
    """An end token that is missed: the answer goes on behind its end, and what follows is trained."""
    model = tiny_model()
    model.generation_config.eos_token_id = of_model
    assert end_token_ids(model, tokenizer) == expected


@pytest.mark.parametrize("dtype, expected", [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_is_as_asked(dtype, expected, tokenizer, tmp_path):
    """bf16 on the CPU by default would round every update of a laptop run away."""
    model, _ = load_model(saved(tmp_path / "model", tokenizer), "cpu", dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_loading_changes_no_weight(tokenizer, tmp_path):
    model = tiny_model(seed=3)
    again, _ = load_model(saved(tmp_path / "model", tokenizer, model), "cpu")
    for (name, old), new in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(old, new), name


# ---------------------------------------------------------------------------------------------------------------------
# Prompts as tokens
# ---------------------------------------------------------------------------------------------------------------------


def with_bos(tokenizer):
    """Like Llama's: the tokenizer puts a BOS before any text, and the chat template writes one, too."""
    bos = tokenizer.convert_tokens_to_ids("<|unk|>")
    tokenizer.bos_token = "<|unk|>"
    before_any_text = TemplateProcessing(single="<|unk|> $A", special_tokens=[("<|unk|>", bos)])
    tokenizer.backend_tokenizer.post_processor = before_any_text
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert tokenizer("1")["input_ids"][0] == bos
    return tokenizer, bos


def test_chat_template_is_used_once(tokenizer):
    """A template rendered to text and tokenized again loses its marks or doubles them: no chat the model knows."""
    ids = encode(tokenizer, MESSAGES)
    assert tokenizer.decode(ids) == "<|system|>Hi<|user|>1+2=<|assistant|>"
    assert tokenizer.decode(encode(tokenizer, "1+2=")) == "<|user|>1+2=<|assistant|>"
    assert all(isinstance(i, int) for i in ids)
    assert encode(tokenizer, ids) == ids and encode(tokenizer, ids) is not ids


def test_chat_template_gets_its_options(tokenizer):
    """enable_thinking that never reaches the template: another mode of the model is trained than the one evaluated."""
    tokenizer.chat_template += "{% if enable_thinking %}think{% endif %}"
    assert tokenizer.decode(encode(tokenizer, "1", {"enable_thinking": True})) == "<|user|>1<|assistant|>think"
    assert tokenizer.decode(encode(tokenizer, "1", {"enable_thinking": False})) == "<|user|>1<|assistant|>"


def test_no_template_means_plain_text(tokenizer):
    """Base models have no template; inventing marks would make every prompt one they have never seen."""
    tokenizer.chat_template = None
    assert tokenizer.decode(encode(tokenizer, MESSAGES)).rstrip("\n") == "Hi\n\n1+2="
    assert tokenizer.decode(encode(tokenizer, "1+2=")).rstrip("\n") == "1+2="


@pytest.mark.parametrize("template", [True, False], ids=["template", "plain"])
@pytest.mark.parametrize("prompt", ["1+2=", MESSAGES, "<|unk|>1+2="], ids=["text", "messages", "bos_inside"])
def test_at_most_one_bos(template, prompt, tokenizer):
    """The template writes a BOS and the tokenizer another: two of them are a start no model was trained on."""
    tokenizer, bos = with_bos(tokenizer)
    if not template:
        tokenizer.chat_template = None
    ids = encode(tokenizer, prompt)
    assert ids[0] == bos and ids[1] != bos


def test_long_prompts_are_dropped_and_listed(tokenizer, capsys):
    """A prompt cut in the middle is another problem; one dropped in silence is a smaller data set than was reported."""
    problems = [Problem("1" * n, "3", f"file:{n}") for n in (3, 20, 8, 9, 30)]  # the template adds two tokens
    kept = tokenize_problems(tokenizer, problems, 10)
    assert [problem.where for problem in kept] == ["file:3", "file:8"]
    assert all(problem.ids == encode(tokenizer, problem.prompt) for problem in kept)
    message = capsys.readouterr().err
    assert all(f"file:{n} " in message for n in (20, 9, 30)) and "file:3 " not in message
    with pytest.raises(UserError, match="max_prompt_length"):
        tokenize_problems(tokenizer, problems, 2)


def test_problems_get_the_templates_options(tokenizer):
    """The options of --chat_template_kwargs, on the way from the command line to every prompt."""
    tokenizer.chat_template += "{% if enable_thinking %}think{% endif %}"
    (problem,) = tokenize_problems(tokenizer, [Problem("1", "1")], 100, {"enable_thinking": True})
    assert tokenizer.decode(problem.ids).endswith("think")


def test_the_code_in_a_model_folder_never_runs(tmp_path, monkeypatch):
    """Left to itself, transformers asks "run the custom code? [y/N]", and one key executes what a stranger uploaded."""
    auto_map = {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"}
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="stranger", auto_map=auto_map)))
    (tmp_path / "stranger.py").write_text("open('ran', 'w')\nclass Config: pass\nclass Model: pass\n")
    TOKENIZER.save_pretrained(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    with pytest.raises(UserError):
        load_model(str(tmp_path), "cpu")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "own, hidden_size, expected",
    [(None, 32, [1]), (None, 512, []), ("2", 32, [])],
    ids=["small", "large", "OMP_NUM_THREADS"],
)
def test_a_small_model_takes_one_thread_unless_the_user_says_otherwise(own, hidden_size, expected, monkeypatch):
    """A second thread makes its products no faster, and on a busy machine each step waits for it."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    tiny_model(hidden_size=hidden_size, intermediate_size=1024).save_pretrained("model")
    TOKENIZER.save_pretrained("model")
    load_model("model")
    assert chosen == expected
