"""Recipes: what they mean, what they cannot mean, and that every shipped one can be run."""

import json
import re
from pathlib import Path

import pytest
import torch

import attamba
from attamba.config import ConfigError, load_run_config, to_dict
from attamba.models.accounting import n_parameters
from attamba.studies.data import separator_ids, tiny_texts
from attamba.studies.engine import Place, resolved
from attamba.studies.recipe import (
    TINY,
    chosen_runs,
    find_recipes,
    find_study,
    load_study,
    save_json,
)
from attamba.studies.scores import check_for_run, make_score

FOLDER = Path(__file__).parents[2] / "studies"
SHIPPED = find_recipes(FOLDER)


@pytest.fixture(scope="module")
def stdlib_texts(tmp_path_factory):
    return tiny_texts(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("scale", ["tiny", "full"])
def test_every_variant_of_a_shipped_recipe_builds(name, scale, stdlib_texts, tmp_path):
    study = load_study(SHIPPED[name])
    assert study.question and study.scores
    place = Place(stdlib_texts, tmp_path, tmp_path)
    for run in study.runs(scale):
        config = run.config(lambda tree, run=run: resolved(tree, run, place))
        with torch.device("meta"):
            model = attamba.build_model(config.model)
        assert sum(p.numel() for p in model.parameters()) == n_parameters(config.model)
        assert config.train.seed == run.seed
        scores = run.scores
        if scale == "full":  # its texts are longer than these
            scores = {name: spec for name, spec in scores.items() if spec["kind"] != "copy"}
        check_for_run(scores, config, stdlib_texts, tiny=scale == "tiny")


def test_shipped_recipes_hold_no_path_of_a_machine():
    for path in SHIPPED.values():
        assert not re.search(r"(^|[\s\"'])/\w", path.read_text(encoding="utf-8"))


def test_variants_differ_from_the_base_by_their_keys_alone(make_study):
    study = make_study(set={"train.steps": 7})
    first, second, third, _ = study.runs("full")
    names = ["chunks-s0", "full-s0", "chunks-s1", "full-s1"]
    assert [run.name for run in study.runs("full")] == names
    assert first.config().train.steps == 7
    assert first.config().model.layer_mixers()[0].chunk_size == 4
    assert second.config().model.layer_mixers()[0].type == "transformer"
    assert (first.seed, third.seed, third.config().train.seed) == (0, 1, 1)


def test_tiny_scale_takes_one_seed_and_little_of_everything(make_study):
    study = make_study(tiny={"data.seq_len": 48})
    runs = study.runs("tiny")
    assert [run.name for run in runs] == ["chunks-s0", "full-s0"]
    config = runs[0].config()
    assert (config.train.steps, config.data.seq_len) == (TINY["train.steps"], 48)
    assert config.model.dim == 32


def test_a_grid_is_every_combination(make_study):
    grid = {"P": {"mixer.chunk_size": [2, 4]}, "L": {"mixer.leading_tokens": [1, None]}}
    study = make_study(grid=grid, variants={})
    assert list(study.variants) == ["P2-L1", "P2-LNone", "P4-L1", "P4-LNone"]
    assert study.variants["P4-L1"] == {"mixer.chunk_size": 4, "mixer.leading_tokens": 1}


def test_what_variants_are_compared_with(make_study):
    variants = {"transformer": {}, "a": {}, "b": {}}
    assert make_study().against == {}
    assert make_study(variants=variants).against == {"a": "transformer", "b": "transformer"}
    assert make_study(variants=variants, against="a").against == {"transformer": "a", "b": "a"}
    assert make_study(variants=variants, against={"b": "a"}).against == {"b": "a"}
    assert make_study(variants=variants, against={}).against == {}


def test_only_chooses_variants_and_runs(make_study):
    study = make_study()
    assert [run.name for run in study.runs("full", "ch*")] == ["chunks-s0", "chunks-s1"]
    assert [run.name for run in study.runs("full", "*-s1")] == ["chunks-s1", "full-s1"]
    with pytest.raises(ConfigError, match=r"--only=x names no run .* chunks, full"):
        chosen_runs([study], "full", "x")


def test_a_recipe_survives_json(tmp_path):
    for path in SHIPPED.values():
        study = load_study(path)
        copy = tmp_path / path.with_suffix(".json").name
        save_json(study, copy)
        assert load_study(copy) == study
        assert find_study(str(copy), tmp_path) == study


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": {}}, "unknown key 'variant'; did you mean 'variants'"),
        ({"report": ["page"]}, "report=['page'] must name some of: paper, main"),
        ({"variants": {}}, "there are no variants"),
        ({"variants": {"a/b": {}}}, "variant 'a/b': a name is letters"),
        ({"variants": {"a": 3}}, "variant a: 3 must be keys and values"),
        ({"seeds": [-1]}, "seeds=[-1] must be whole numbers"),
        ({"grid": {"P": {"mixer.chunk_size": 4}}}, "grid.P.mixer.chunk_size=4 must be a list"),
        ({"scores": {"b": {"kind": "txt"}}}, "did you mean 'text'"),
        ({"scores": {"b": {"kind": "text", "contxt": 3}}}, "did you mean 'context'"),
        ({"scores": {"b": {"kind": "passkey", "lengths": []}}}, "scores.b.lengths=[] measures"),
        ({"paper": {"nobody": "x"}}, "paper names 'nobody', which is not a variant"),
        ({"against": "nobody"}, "against names 'nobody', which is not a variant"),
        ({"against": {"full": ["chunks"]}}, "against names ['chunks'], which is not a variant"),
        ({"against": {"full": "full"}}, "against.full is that variant itself"),
        ({"against": ["full"]}, "against=['full'] must be a variant, or variants and their"),
        ({"base": {"train": {"stps": 3}}}, "did you mean 'steps'"),
    ],
)
def test_what_a_recipe_cannot_mean(make_study, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_study(**changes)


def test_an_unknown_study_names_the_nearest(make_study, tmp_path):
    make_study()
    with pytest.raises(ConfigError, match="did you mean 'little'"):
        find_study("litle", tmp_path / "recipes")


def test_base_is_a_file_beside_the_recipe(tmp_path):
    (tmp_path / "base.json").write_text(json.dumps({"train": {"steps": 3}}))
    recipe = {"report": ["main"], "base": "base.json", "variants": {"a": {}}}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    study = load_study(tmp_path / "r.json")
    assert study.base == to_dict(load_run_config(tmp_path / "base.json"))


def test_separators_are_found_in_the_tokenizer(texts):
    from attamba.data import TokenDataset

    tokenizer = TokenDataset.open(texts / "train").tokenizer
    marks = separator_ids(tokenizer, "punctuation")
    assert {ord("."), ord(","), ord("\n")} <= set(marks)
    assert not set(marks) & {ord("a"), ord(" "), 0}
    assert ord(" ") in separator_ids(tokenizer, "words")
    with pytest.raises(ConfigError, match=r"boundary\.tokens='comma' must be a list of ids"):
        separator_ids(tokenizer, "comma")


def test_tiny_scores_read_little():
    score = make_score({"kind": "passkey", "lengths": [65536]}, "scores.p").at_tiny_scale()
    assert max(score.lengths) < 2000 and score.rows < 10
