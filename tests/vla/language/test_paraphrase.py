"""Paraphrases say the same thing in other words, and in none that the tests of robustness use."""

from __future__ import annotations

import difflib
import re

import numpy as np
import pytest

from envs.perturb import rewording
from envs.tabletop.language import GOAL_TEMPLATES, KIND_WORDS, TEMPLATES
from vla.language.names import COLORED, COLORS, THINGS
from vla.language.paraphrase import PLAIN, about_nothing, paraphrase
from vla.language.words import KEPT_FOR_TESTS, VOCABULARY

SENTENCES = (
    "pick up the red cube",
    "raise the blue brick from the table",
    "on top of the red can set the blue cube",
    "move the cube nearest to the plate to the bowl",
    "first open the drawer then put the red cube in the drawer",
    "push the red domino onto the zone",
    "press the button",
    "close the drawer",
)


def drawn(text: str, count: int = 200, **more: object) -> list[str]:
    rng = np.random.default_rng(0)
    return [paraphrase(text, rng, **more) for _ in range(count)]


@pytest.mark.parametrize("text", SENTENCES)
def test_most_are_new_and_a_share_stays(text):
    said = drawn(text, 400)
    assert 0.6 * PLAIN < said.count(text) / 400 < 1.7 * PLAIN
    assert len(set(said)) > 60
    assert said == drawn(text, 400), "a function of the generator"


def test_the_color_and_the_thing_stay_or_become_their_synonyms():
    for said in drawn("pick up the yellow can", 600):
        names = ("yellow", *(word for name in COLORS["yellow"] for word in name.split()))
        slips = difflib.get_close_matches  # a slip of the pen, at worst
        assert any(slips(word, names, cutoff=0.7) for word in re.findall(r"\w+", said)), said
    for other in ("red", "green", "blue", "purple", "cube", "brick", "plate"):
        assert not any(re.search(rf"\b{other}\b", said) for said in drawn("pick up the yellow can", 600))


def test_what_goes_where_is_never_swapped():
    for said in drawn("put the green ball on the purple bowl", 600):
        if said.startswith(("on", "over", "down", "please, on", "atop")):
            continue
        ball = re.search(r"green|emerald|lime|mint", said)
        bowl = re.search(r"purple|violet|plum|lilac|mauve|grape", said)
        where = re.search(r"\b(on|onto|atop|over|down)\b", said)
        if ball and bowl and where:
            at_the_place = said[where.start() :]
            assert bowl.start() > where.start(), said
            assert re.search(r"\b(ball|sphere|orb|globe)\b", said) is None or "bowl" not in at_the_place[:4], said


def says_red(text: str) -> bool:
    """With "red", another name for it, or one of these with a slip of the pen."""
    names = {"red", *(word for name in (*COLORS["red"], *COLORED["red"]) for word in name.split())}
    return any(difflib.get_close_matches(word, names, cutoff=0.7) for word in re.findall(r"\w+", text))


@pytest.mark.parametrize("others", [(), ("the red can", "the blue cube")])
def test_color_and_kind_are_both_told_where_they_are_needed(others):
    said = drawn("pick up the red cube", 600, others=others)
    assert all(map(says_red, said))
    assert not any(re.search(r"\b(thing|object|item|gadget)\b", text) for text in said if "cubical" not in text)


def test_one_of_them_is_enough_where_nothing_else_has_it():
    said = drawn("pick up the red cube", 600, others=["the red can"])
    assert 120 < sum(not says_red(text) for text in said) < 300
    assert not any(re.search(r"\b(gadget|gizmo|widget|item)\b", text) for text in said)
    said = drawn("pick up the red cube", 600, others=["the blue cube"])
    assert all(map(says_red, said))
    assert any(re.search(r"\b(gadget|gizmo|widget|item)\b", text) for text in said)


def test_a_task_of_another_dataset_keeps_its_words():
    for said in drawn("unfold the napkin beside the sink", 200):
        words = set(re.findall(r"\w+", said))
        assert len({"unfold", "napkin", "beside", "sink"} & words) >= 3, said


def test_no_paraphrase_has_the_form_of_a_held_out_phrasing():
    forms = [form for table in (TEMPLATES, GOAL_TEMPLATES) for forms in table.values() for form in forms["heldout"]]
    for form in forms:
        plain = re.sub(r"\{\w\}", "the red cube", form)
        assert KEPT_FOR_TESTS.search(plain), form
    for text in SENTENCES:
        assert not any(KEPT_FOR_TESTS.search(said) for said in drawn(text) if said != text)


def test_the_words_of_the_axis_instruction_are_in_no_paraphrase():
    suites = {
        word
        for table in (TEMPLATES, GOAL_TEMPLATES)
        for forms in table.values()
        for form in forms["train"]
        for word in re.findall(r"[a-z]+", form)
    }
    tests = {word for synonyms in rewording._SYNONYMS.values() for text in synonyms for word in text.split()}
    tests |= {word for text in (*rewording._OPENINGS, *rewording._ENDINGS) for word in re.findall(r"[a-z]+", text)}
    kept = tests - suites - set(COLORS) - {"let"}
    assert kept and not kept & VOCABULARY


def test_every_thing_of_the_suites_has_synonyms():
    assert {word for words in KIND_WORDS.values() for word in words} <= set(THINGS)


def test_about_nothing_names_nothing_that_is_there():
    rng, there = np.random.default_rng(0), ["the red cube", "the blue can"]
    said = [about_nothing("pick up the red block", rng, things=there) for _ in range(400)]
    assert not any(re.search(r"red (cube|block)|blue (can|cylinder)", text) for text in said)
    assert any("green" in text for text in said) and any("blue cube" in text or "blue block" in text for text in said)
    assert len(set(said)) > 60
    others = [about_nothing("push the coffee mug", rng, things=["the coffee mug", "the red ball"]) for _ in range(200)]
    assert not any("coffee mug" in text for text in others)
    mixed = [text for text in said if re.search(r"red can|blue cube", text)]
    assert len(mixed) > 80, "both words are in sight, on two things"
