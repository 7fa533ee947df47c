"""Instructions as text: what is kept, dropped or refused; plain words read as they always did."""

import logging
import random
import re
import unicodedata

import pytest
from tokenizers import Tokenizer

from envs.perturb.rewording import reword
from policies.export.exported_policy import FileTokenizer
from tests.vla.toy_backbone import WORDS, ToyTokenizer
from vla.backbones.loading import SHIPPED
from vla.backbones.tiny import train_tokenizer
from vla.processing.text import (
    MOST_TOKENS,
    plain_text,
    read,
    read_alike,
    remarks,
    room_for_text,
    tokens_of,
    warn_of_lookalikes,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["pick up the red cube and put it on the blue plate, 5 cm to the left"] * 3, vocab_size=400)


def ids(tokenizer, text, limit=400):
    return tokens_of(text, tokenizer, rule="signs", limit=limit)


def before_there_was_a_choice(text):
    return " ".join(re.sub(r"[^\w\s]|_", " ", text.lower()).split())


def test_plain_words_read_as_they_always_did():
    rng = random.Random(0)
    letters = "abcXYZ019  .,!?'\"():;_éß中"
    for _ in range(3000):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(1, 30)))
        text = re.sub(r"(?<=\d)[.,:](?=\d)|\.(?=\d)", " ", text)  # decimals are new
        assert plain_text(text, "signs") == before_there_was_a_choice(text), text
        assert plain_text(text) == before_there_was_a_choice(text)
    for seed in range(200):
        text = reword("Pick up the red mug and put it next to the blue-green plate.", (seed,), 1.0)
        assert plain_text(text, "signs") == before_there_was_a_choice(text)


def test_policies_made_before_read_what_they_were_trained_on():
    assert plain_text("move -5 cm, Räum 1.5", "words") == "move 5 cm räum 1 5"
    assert plain_text("Ra\u0308um", "words") == "ra um"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("move -5 cm", "move +5 cm"),
        ("move -5 cm", "move 5 cm"),
        ("move +5 cm", "move 5 cm"),
        ("x > y", "x < y"),
        ("x >= y", "x <= y"),
        ("move 1.5 cm", "move 15 cm"),
        ("move 1.5 cm", "move 1 5 cm"),
        ("move .5 cm", "move 5 cm"),
        ("pour 1/2 cup", "pour 12 cup"),
        ("open 50%", "open 50"),
        ("turn 90°", "turn 90"),
        ("sort 🟥", "sort 🟦"),
        ("go ←", "go →"),
        ("½ turn", "¼ turn"),
        ("काली", "काल"),
        ("resume", "résumé"),
    ],
)
def test_what_means_something_is_kept(tokenizer, one, other):
    assert ids(tokenizer, one) != ids(tokenizer, other)
    assert read_alike([one, other], lambda text: ids(tokenizer, text)) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ra\u0308um den Tisch auf", "Räum den Tisch auf"),
        ("x>y", "x > y"),
        ("move -5 cm", "move \u22125 cm"),
        ("move -5 cm", "Move – 5 cm."),
        ("pick\tup\nthe  cube", "pick up the cube"),
        ("\ufeffpick up the cu\u00adbe", "pick up the cube"),
        ("pick up\u200bthe cube", "pick up the cube"),
        ("➡\ufe0f 5", "➡ 5"),
        ("Pick-up the RED_cube, please!", "pick up the red cube please"),
        ("block-2", "block 2"),
    ],
)
def test_how_it_is_written_down_does_not_matter(tokenizer, one, other):
    assert ids(tokenizer, one) == ids(tokenizer, other)


@pytest.mark.parametrize("text", ["लाल घन उठाओ", "หยิบลูกบาศก์สีแดง", "đặt khối đỏ", "ضع المكعّب"])
def test_marks_belong_to_their_words(tokenizer, text):
    for form in ("NFC", "NFD"):
        given = unicodedata.normalize(form, text)
        assert plain_text(given, "signs") == unicodedata.normalize("NFC", text)
        assert tokenizer.decode(ids(tokenizer, given)).strip() == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "?!", "...", "-", "_", "\u200b", "\u0301", "\ufe0f", "\ud800"])
def test_nothing_said_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match="must say something, got '.*': no word, number or symbol"):
        ids(tokenizer, text)


@pytest.mark.parametrize("text", [None, 5, b"pick", ["pick"]])
def test_what_is_no_text_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match=f"must be text, got {type(text).__name__}"):
        ids(tokenizer, text)


def test_an_overlong_instruction_is_cut_and_told_once(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr("vla.processing.text._told_before", set())
    for text in ("pick up " * 625, "x" * 5000, "pick up the cube" + " " * 1_000_000 + "cube"):
        whole = tokenizer(plain_text(text[:40_000], "signs"), add_special_tokens=False)["input_ids"]
        for limit in (24, MOST_TOKENS):
            caplog.clear()
            found = ids(tokenizer, text, limit), ids(tokenizer, text, limit)
            assert found[0] == found[1] == tuple(whole[:limit])
            cut = [message for message in caplog.messages if "cut after" in message]
            assert len(cut) == (limit == 24), "once in a process"
            assert all("\n" not in line and len(line) < 250 for line in cut)
    assert cut == []
    monkeypatch.setattr("vla.processing.text._told_before", set())
    ids(tokenizer, "pick up " * 625, 24)
    shown = "pick up pick up pick up pick up pick up pick up pick up pick"
    assert caplog.messages[-1] == (
        f"the instruction '{shown}...' cut after 24 tokens, all that the policy reads: say it in fewer words"
    )


def test_a_text_of_any_size_is_read_without_its_end(tokenizer):
    """Megabytes of it are neither tokenised nor kept."""

    class Counting:
        longest = 0

        def __call__(self, text, add_special_tokens):
            self.longest = max(self.longest, len(text))
            return tokenizer(text, add_special_tokens=add_special_tokens)

    counting = Counting()
    assert len(ids(counting, "x" * 10_000_000, 24)) == 24 and counting.longest == 24 * 64


def test_training_makes_room_up_to_a_limit(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr("vla.processing.text._told_before", set())
    room = lambda *texts, least=24, **most: room_for_text(texts, tokenizer, rule="signs", least=least, **most)  # noqa: E731
    assert room("pick up the cube") == 24
    assert room("pick up the cube", "zzzz " * 20) == len(ids(tokenizer, "zzzz " * 20)) > 24
    caplog.clear()
    assert room("word " * 2500, "pick up the cube", "bird " * 2500) == MOST_TOKENS
    assert len(caplog.messages) == 1, "one warning, with all that it is about"
    assert "the instructions 'word word " in caplog.text and "...', 'bird bird" in caplog.text
    assert f"cut after {MOST_TOKENS} tokens" in caplog.text and "pick up" not in caplog.text
    assert room("word " * 2500, most=100) == 100
    assert room("word " * 600, least=5000) == 5000


def test_instructions_that_read_alike_are_named(tokenizer, caplog):
    tokens = lambda text: ids(tokenizer, text)  # noqa: E731
    assert read_alike(["Pick up the cube.", "pick up  the cube", "pick up the cube!"], tokens) == []
    lines = read_alike(["red/blue", "red blue", "green"], tokens)
    assert len(lines) == 1 and "'red blue'" in lines[0] and "'red/blue'" in lines[0]
    assert read_alike(["move -5 cm", "move 5 cm"], lambda text: plain_text(text).split()) != []  # an older policy
    with caplog.at_level(logging.WARNING):
        warn_of_lookalikes([f"{i} a{mark}b" for i in range(4) for mark in " /&"], tokens)
    pairs = [message for message in caplog.messages if "has no word" not in message]
    assert len(pairs) == 6 and "and 3 more pairs" in pairs[-1]


def test_a_vocabulary_without_a_word_says_so(caplog):
    tokenizer = ToyTokenizer(WORDS)
    tokenizer.unk_token_id = 1
    with caplog.at_level(logging.WARNING):
        tokens_of("pick up the purple 🟥 cube", tokenizer, rule="signs", limit=24)
    assert caplog.messages == [
        "the policy's vocabulary lacks 'purple', '🟥', in the instruction 'pick up the purple 🟥 cube'"
    ]
    assert read_alike(
        ["the purple cube", "the pink cube"], lambda t: tokenizer(t, add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize(
    ("instruction", "told"),
    [
        ("pick up the red cube", None),
        ("stack the green brick on top of the red can", None),
        ("move 12 cm to the left - 3", None),
        ("could you fetch me the yellow one?", "'could', 'you', 'fetch'"),
        ("pick up teh yelow bar", "'teh', 'yelow'"),
        ("拿起红色方块", "'拿起红色方块'"),
        ("pick up the red cube 🙏", "'🙏'"),
    ],
)
def test_words_that_the_backbone_only_spells_are_told_once(monkeypatch, caplog, instruction, told):
    from vla.backbones.hub import load

    monkeypatch.setattr("vla.processing.text._told_before", set())
    tokenizer = load("tiny-goals").tokenizer
    for _ in range(2):
        tokens_of(instruction, tokenizer, rule="signs", limit=100)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (told is not None)
    assert told is None or f"has no word for {told}: it means nothing unless training used it" in said[0]


def test_words_that_are_spelled_are_told_until_they_are_many(monkeypatch, caplog):
    from vla.backbones.hub import load

    monkeypatch.setattr("vla.processing.text._told_before", set())
    tokenizer = load("tiny-goals").tokenizer
    for k in range(40):
        tokens_of("lift the " + "qz" * (k + 2), tokenizer, rule="signs", limit=100)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 13 and "more words" in said[-1]


def test_a_symbol_in_two_pieces_is_spelled_and_a_short_word_is_not():
    def pairs(text, add_special_tokens):  # two tokens a word, as SmolLM2 has for many emoji
        return {"input_ids": [number for word in text.split() for number in (len(word), 0)]}

    assert read("go 🟥 12 °", pairs, rule="signs", limit=100).spelled == ("🟥", "°")


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_shipped_tokenizer_spells_whatever_is_said(name):
    data = (SHIPPED[name] / "tokenizer.json").read_bytes()
    tokenizer, whole = FileTokenizer(data), Tokenizer.from_str(data.decode())
    for point in [*range(0x20, 0x250), *range(0x250, 0x110000, 11)]:
        text = plain_text(chr(point), "signs")
        if unicodedata.category(chr(point)) in ("Cn", "Co", "Cs") or not text:
            continue
        assert whole.decode(tokenizer(text)["input_ids"]).strip() == text, hex(point)
    for said in ("🟥", "拿起红色方块", "возьми красный куб", "ارفع المكعّب"):
        lines = remarks(said, read(said, tokenizer, rule="signs", limit=100))
        assert len(lines) == 1 and "has no word for" in lines[0], "an answer, whatever the script"


@pytest.mark.parametrize(
    ("instruction", "told"),
    [
        ("pick up the red cube", []),
        ("🟥🟦", ["no word for '🟥', '🟦'"]),
        ("拿起红色方块", ["no word for '拿起红色方块'"]),
        ("pick up the cup " * 400, ["cut after 100 tokens"]),
        ("🙏 " * 400, ["cut after 100 tokens", "no word for '🙏'"]),
    ],
)
def test_what_a_person_should_know_about_an_instruction(instruction, told):
    from vla.backbones.hub import load

    tokenizer = load("tiny-goals").tokenizer
    for _ in range(2):  # whoever was told before: every client is
        lines = remarks(instruction, read(instruction, tokenizer, rule="signs", limit=100))
        assert len(lines) == len(told) and all(part in line for part, line in zip(told, lines, strict=True)), lines


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_words_run_together_are_told(name):
    tokenizer = FileTokenizer((SHIPPED[name] / "tokenizer.json").read_bytes())
    for said in ("pickUpTheRedCubeAndPutItDown", "liftthegreenballoffthetable"):
        assert read(said, tokenizer, rule="signs", limit=100).spelled == (said.lower(),)
    assert read("2 to the left, please", tokenizer, rule="signs", limit=100).spelled == ()


def test_the_colours_of_a_terminal_say_nothing(tokenizer):
    assert plain_text("\x1b[1;31mpick up the red cube\x1b[0m", "signs") == "pick up the red cube"


def test_a_broken_character_is_refused(tokenizer):
    for rule in ("signs", "words"):
        with pytest.raises(
            ValueError, match=r"'pick up the r\\udce9d cube' has a broken character .* not read as UTF-8"
        ):
            tokens_of("pick up the r\udce9d cube", tokenizer, rule=rule, limit=100)
