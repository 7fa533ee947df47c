"""Vocabulary of the paraphrases that training hears: no words and no forms that tests use (tests hold that)."""

from __future__ import annotations

import re

from vla.language.names import ABSENT_THINGS, CHAT, CHAT_ABOUT, COLORED, COLORS, NEUTRAL_LOOKS, NEUTRAL_THINGS, THINGS

SIZES = ("small", "little", "tiny")

PICK = (
    "pick up {o}", "lift {o}", "grab {o}", "take {o}", "raise {o}", "lift up {o}", "take hold of {o}", "grasp {o}",
    "obtain {o}", "catch {o}", "pull up {o}", "lift {o} up high",  "hold {o}",
    "take up {o}", "pick {o}", "lift {o} off the table", "pick {o} from the table", 
    "grab {o} and lift it", "raise {o} into the air", "hold {o} up", "pick out {o}", "take {o} between your fingers",
    "move over to {o} and lift it", "find {o} and grasp it", "look for {o} and take it", "choose {o} and raise it",
    "there is {o}, pick it", "see {o}, take it", "{o} is the one to lift", "{o} should be lifted",
    "{o} has to be picked", "{o}: lift it", "{o}, please", "{o}", "as for {o}, raise it", "it is {o} you should take",
    "close your fingers on {o} and lift", "move to {o} and pick it", "lift whatever is {o}",
)  # fmt: skip
"""Forms of an instruction to lift {o}."""
PLACE_VERBS = (
    "put",
    "place",
    "move",
    "position",
    "deposit",
    "transfer",
    "leave",
    "rest",
    "park",
    "store",
    "drop off",
    "deliver",
)
"""Verbs with a thing and a place."""
DROP_VERBS = (*PLACE_VERBS, "drop", "throw", "release", "insert")
PUSH_VERBS = ("push", "slide", "drag", "shift", "scoot", "press")
STACK_VERBS = ("stack", "put", "place", "set", "balance", "position")
TAKE_VERBS = ("pick up", "take", "lift", "grab", "obtain", "grasp", "lift up")
OPEN = ("open {f}", "pull {f} open", "pull out {f}", "slide {f} open", "open up {f}", "slide out {f}", "yank {f} open",
        "{f} should be open", "{f}: open it", "make {f} open", "take {f} and pull")  # fmt: skip
CLOSE = ("close {f}", "push {f} shut", "shut {f}", "slide {f} shut", "close up {f}", "slide {f} in", "push {f} in",
         "{f} should be closed", "{f}: close it", "make sure {f} is closed")  # fmt: skip
PRESS = ("press {f}", "push {f}", "push down {f}", "press down on {f}", "click {f}", "activate {f}", "trigger {f}",
         "press on {f}", "{f} should be pressed", "{f}: press it", "use {f}")  # fmt: skip
PLACES = {
    "on": ("on", "onto", "on top of", "down on", "over on"),
    "onto": ("onto", "on", "over onto"),
    "on top of": ("on top of", "atop", "on", "onto"),
    "in": ("in", "into", "inside"),
    "into": ("into", "in", "inside"),
    "to": ("to", "over to", "onto", "on"),
    "over": ("over", "onto"),
}
"""Other words for where."""

BEFORE = (
    "please ", "please, ", "could you ", "could you please ", "can you ", "can you please ", "would you ", "will you ",
    "would you please ", "i want you to ", "i would like you to ", "i'd like you to ", "your task is to ", "robot, ",
     "try to ", "you should ", "you have to ", "the task is to ", "next, ", "dear robot, ", "help me to ",
    "make sure to ", "we want to ", "it is time to ", "use the gripper to ", "with the gripper ", "carefully ",
    "gently ", "slowly ", "quickly ", "just ", "simply ", "alright, ", "well, ", "so, ", "hello, ", "first of all, ",
    "listen, ", "the goal is to ", "be so kind as to ", "please try to ", "remember to ", "your job: ",
)  # fmt: skip
"""Words that people say in front of an instruction."""
AFTER = (
    " please", ", please", " for me", ", thank you", " if you can", " carefully", " gently", " slowly", " quickly",
    " with the gripper", " when you are ready", ", would you", " if possible", ", nothing else", " and be careful",
    " without touching anything else", " right away", " at once", ", my friend", " for us", ", robot",
)  # fmt: skip
JOINS = ((" then "), (", then "), (" and then "), (", and then "), ("; afterwards "), (", afterwards "), (", next "))

KEPT_FOR_TESTS = re.compile(
    r"pick (?!up|out|hold)[^,]+ up$|please grab .+ from the table$|take .+ and lift it up$"
    r"|on (?!top)[^,]+? put the|lift .+ and move it to |please place .+ on |into [^,]+? drop |and put it into "
    r"|onto [^,]+? push |without lifting it slide|on top of [^,]+? stack |and set it on |pull open |please pull .+ out"
    r"|push shut|please shut|press .+ down$|please push down on|first .+ and then "
)
"""Forms in which the suites' held-out phrasings say things."""

_LISTS = (PICK, PLACE_VERBS, DROP_VERBS, PUSH_VERBS, STACK_VERBS, TAKE_VERBS, OPEN, CLOSE, PRESS, SIZES, BEFORE, AFTER,
          ABSENT_THINGS, CHAT, CHAT_ABOUT, NEUTRAL_LOOKS, NEUTRAL_THINGS, JOINS, *COLORS.values(), *COLORED.values(),
          *THINGS.values(), *PLACES.values(), COLORS, THINGS)  # fmt: skip
VOCABULARY = frozenset(word for texts in _LISTS for text in texts for word in re.findall(r"[a-z']+", text))
"""Every word that a paraphrase may bring in, typos aside."""
