"""The needle checkpoint in transformers, unmodified, against the oracle."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.core.errors import ConfigError
from services.launcher import needle_model
from services.launcher.needle.checkpoint import write_checkpoint
from services.launcher.needle.codes import token_codes
from services.launcher.needle.positional import rotary_frequencies, smallest_deficit
from services.launcher.needle.spec import MAX_POSITIONS, SHIFT_LAYERS, four_squares, needle_spec
from services.launcher.needle.task import make_task, oracle

MARGIN = 15.9  # of the logits, by construction 16


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Needle:
    """A checkpoint on disk, loaded by transformers' Auto classes."""

    def __init__(self, directory: Path, preset: str, layers: int, dtype: str):
        self.spec = needle_spec(preset, layers)
        self.vocabulary = self.spec.vocabulary
        write_checkpoint(directory, self.spec, dtype)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def logits(self, prompt, answer, position_ids=None):
        """Logits from which each token of the answer is drawn, [len(answer), vocabulary], in one forward pass."""
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        with torch.no_grad():
            out = self.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=position_ids,
                logits_to_keep=len(answer),
            )
        return out.logits[0].float()

    def assert_answers(self, prompt, answer, position_ids=None):
        logits = self.logits(prompt, answer, position_ids)
        assert logits.argmax(dim=-1).tolist() == list(answer)
        assert smallest_margin(logits) >= MARGIN


def smallest_margin(logits):
    best = logits.topk(2, dim=-1).values
    return float((best[:, 0] - best[:, 1]).min())


@pytest.fixture(scope="module")
def needle(tmp_path_factory):
    loaded = {}

    def get(preset, layers, dtype):
        name = f"{preset}-{layers}-{dtype}"
        if name not in loaded:
            loaded[name] = Needle(tmp_path_factory.mktemp(name), preset, layers, dtype)
        return loaded[name]

    return get


CHECKPOINTS = pytest.mark.parametrize(
    ("preset", "layers", "dtype"),
    [
        ("std", 4, "bfloat16"),
        ("std", 4, "float32"),
        ("std", 8, "bfloat16"),
        ("std", 8, "float32"),
        ("mini", 4, "bfloat16"),
        ("mini", 4, "float32"),
    ],
)


@CHECKPOINTS
@pytest.mark.parametrize("missing", [False, True], ids=["found", "missing"])
def test_greedy_generation(needle, preset, layers, dtype, missing):
    needle = needle(preset, layers, dtype)
    task = make_task(needle.vocabulary, 1024, 0.4, seed=layers, missing=missing)
    out = needle.model.generate(
        torch.tensor([task.prompt_token_ids]),
        max_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert out.sequences[0, 1024:].tolist() == list(task.expected_token_ids)
    assert smallest_margin(torch.cat(out.logits).float()) >= MARGIN


@CHECKPOINTS
def test_every_depth_and_missing_keys(needle, preset, layers, dtype):
    needle = needle(preset, layers, dtype)
    for seed, (context_tokens, depth) in enumerate([(300, 0.0), (1024, 0.0), (1500, 0.5), (1024, 1.0), (4096, 0.1)]):
        task = make_task(needle.vocabulary, context_tokens, depth, seed)
        needle.assert_answers(task.prompt_token_ids, task.expected_token_ids)
        task = make_task(needle.vocabulary, min(context_tokens, 1024), depth, seed, missing=True)
        needle.assert_answers(task.prompt_token_ids, task.expected_token_ids)


@pytest.mark.parametrize("preset", ["std", "mini"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_needle_and_question_two_million_positions_apart(needle, preset, dtype):
    needle = needle(preset, 4, dtype)
    for depth in (0.0, 0.3, 0.9):
        task = make_task(needle.vocabulary, 600, depth, seed=9)
        length = len(task.prompt_token_ids) + len(task.expected_token_ids) - 1
        positions = torch.arange(length)
        positions[-30:] += MAX_POSITIONS - length  # question and answer stand at the far end
        needle.assert_answers(task.prompt_token_ids, task.expected_token_ids, positions[None])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_text_is_continued_as_the_oracle_says(needle, dtype):
    """Texts of few letters, full of almost-matches, short ones and ones with a second BOS."""
    needle = needle("std", 4, dtype)
    bos = needle.vocabulary.bos
    rng = random.Random(4)
    continued = 0
    for case in range(40):
        body = rng.choices([97, 98, 99], k=rng.choice([1, 3, 8, 12, 150]))
        if case % 4 == 0:
            body.insert(rng.randrange(len(body) + 1), bos)
        cut = rng.randrange(len(body))
        prompt = [bos, *body, *body[cut : cut + 9]]
        if prompt[-1] == bos:
            continue
        try:
            answer = oracle(needle.vocabulary, prompt, max_tokens=10)
        except ValueError:
            continue  # ambiguous
        needle.assert_answers(prompt, answer)
        continued += len(answer) > 1
    assert continued >= 5


def test_every_retrieve_head_is_needed(needle):
    needle = needle("std", 8, "float32")
    head_dim = needle.spec.head_dim
    tasks = [make_task(needle.vocabulary, 300, 0.5, seed) for seed in range(3)]
    for layer in needle.model.model.layers[SHIFT_LAYERS:]:
        weight = layer.self_attn.o_proj.weight
        for head in range(4):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            kept = weight.data[:, columns].clone()
            weight.data[:, columns] = 0.0
            margins = [smallest_margin(needle.logits(t.prompt_token_ids, t.expected_token_ids)) for t in tasks]
            weight.data[:, columns] = kept
            assert min(margins) < MARGIN - 1.0


@CHECKPOINTS
def test_norms_are_the_identity(needle, preset, layers, dtype):
    needle = needle(preset, layers, dtype)
    task = make_task(needle.vocabulary, 200, 0.5, seed=0)
    with torch.no_grad():
        out = needle.model(torch.tensor([task.prompt_token_ids]), output_hidden_states=True)
    for hidden in out.hidden_states[:-1]:
        squares = hidden.double().square().sum(dim=-1)
        assert (squares - needle.spec.hidden_size).abs().max() < 0.01


@pytest.mark.parametrize("preset", ["std", "mini"])
def test_tokenizer_round_trip(needle, preset):
    needle = needle(preset, 4, "bfloat16")
    task = make_task(needle.vocabulary, 2000, 0.5, seed=2)
    assert tuple(needle.tokenizer(task.prompt_text)["input_ids"]) == task.prompt_token_ids
    decoded = needle.tokenizer.decode(task.expected_token_ids, skip_special_tokens=True)
    assert decoded == task.expected_text
    assert needle.tokenizer.eos_token_id == needle.vocabulary.eos
    assert needle.tokenizer.pad_token_id == needle.vocabulary.pad


def test_bytes_are_tokens_of_the_std_preset(needle):
    tokenizer = needle("std", 4, "bfloat16").tokenizer
    text = "Grüße, 世界! 🙂\r\n\t\x00  two  spaces"
    ids = tokenizer(text)["input_ids"]
    assert ids == [256, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("preset", ["std", "mini"])
def test_positional_weights_pick_out_one_offset(preset):
    """Every integer offset up to 2.2 million stays tens of nats below the peak, and the sink lies half-way between."""
    spec = needle_spec(preset)
    kernel = spec.positional
    weights = torch.tensor(kernel.weights)
    assert torch.equal(weights.bfloat16().float(), weights)
    deficit = smallest_deficit(kernel, rotary_frequencies(spec.head_dim, spec.rope_theta), 2_200_000)
    assert deficit == pytest.approx({"std": 0.1589, "mini": 0.0874}[preset], abs=1e-4)
    nats = spec.head_dim**-0.5
    assert (kernel.peak - kernel.sink) * nats > 43
    assert (kernel.sink - kernel.peak * (1 - deficit)) * nats > 43
    assert (kernel.sink + kernel.sink_at_bos - kernel.peak) * nats > 43


@pytest.mark.parametrize("preset", ["std", "mini"])
def test_codes_are_distinct_and_balanced_over_the_digits(preset):
    spec = needle_spec(preset)
    codes = token_codes(spec, seed=0)
    products = codes @ codes.T
    np.fill_diagonal(products, -np.inf)
    assert products.max() == spec.code_dims - 2 * spec.code_distance
    ones = (codes[list(spec.vocabulary.digits), : spec.info_bits] > 0).sum(axis=0)
    assert ones.min() >= 4
    assert ones.max() <= 6


def test_four_squares():
    for total in range(300):
        parts = four_squares(total)
        assert sum(part * part for part in parts) == total
        assert list(parts) == sorted(parts, reverse=True)


def read_files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_equal_arguments_give_equal_bytes(tmp_path, capsys):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "7")):
        assert needle_model.main([str(tmp_path / name), "--preset", "mini", "--seed", seed]) == 0
    assert "needle mini, 4 layers, bfloat16" in capsys.readouterr().out
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")
    assert read_files(tmp_path / "a")["model.safetensors"] != read_files(tmp_path / "c")["model.safetensors"]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["head_dim"], config["dtype"]) == (4, 64, "bfloat16")


def test_too_few_layers_are_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match="at least 3 layers"):
        needle_spec("std", 2)
    with pytest.raises(SystemExit):
        needle_model.main([str(tmp_path), "--layers", "2"])
    assert "at least 3 layers" in capsys.readouterr().err
