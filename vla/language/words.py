"""Vocabulary of the paraphrases that training hears: no words and no forms that tests use (tests hold that)."""

from __future__ import annotations

import re

COLORS: dict[str, tuple[str, ...]] = {
    "red": ("carmine", "rosy red", "blood red", "red coloured", "brick red", "fire red", "rust red", "tomato red"),
    "green": (
        "lime",
        "grass green",
        "leaf green",
        "green coloured",
        "mint",
        "forest green",
        "olive green",
        "pea green",
    ),
    "blue": ("azure", "sky blue", "ocean blue", "blue coloured", "royal blue", "ink blue", "indigo blue", "denim blue"),
    "yellow": ("amber", "sunny yellow", "yellow coloured", "gold", "mustard", "honey yellow", "butter yellow", "straw"),
    "purple": (
        "lilac",
        "mauve",
        "purple coloured",
        "deep purple",
        "orchid",
        "fuchsia",
        "heather purple",
        "wine purple",
    ),
    "black": ("jet black", "ebony", "dark"),
    "white": ("snow white", "ivory", "pale"),
    "orange": ("tangerine", "orange coloured"),
    "brown": ("chestnut", "chocolate brown"),
    "pink": ("rose", "rosy"),
    "gray": ("grey", "silver"),
}
"""Other words for a colour."""
THINGS: dict[str, tuple[str, ...]] = {
    "cube": ("block", "cuboid", "building block", "toy block", "box shaped block"),
    "block": ("cube", "cuboid", "building block", "toy block"),
    "can": ("cylinder", "soda can", "drink can", "beverage can", "round can"),
    "cylinder": ("can", "soda can", "round can"),
    "brick": ("bar", "long brick", "plank", "long block"),
    "bar": ("brick", "plank", "long bar"),
    "ball": ("sphere", "orb", "globe", "round ball"),
    "sphere": ("ball", "orb", "globe"),
    "bottle": ("flask", "vial", "carafe"),
    "flask": ("bottle", "vial", "carafe"),
    "mug": ("cup", "teacup", "coffee mug", "coffee cup"),
    "cup": ("mug", "teacup", "coffee cup"),
    "arch": ("bridge", "archway", "portal"),
    "bridge": ("arch", "archway", "portal"),
    "pyramid": ("steps", "stepped pyramid", "stair"),
    "steps": ("pyramid", "stepped pyramid", "stair"),
    "domino": ("tile", "domino tile", "flat tile"),
    "tile": ("domino", "domino tile", "flat tile"),
    "plate": ("saucer", "platter", "disc", "round plate"),
    "bowl": ("dish", "basin", "round bowl"),
    "dish": ("bowl", "basin"),
    "box": ("tray", "crate", "open box"),
    "tray": ("box", "crate"),
    "bin": ("tray", "crate", "box"),
    "zone": ("spot", "area", "patch", "marked area"),
    "spot": ("zone", "area", "patch"),
    "drawer": ("desk drawer", "compartment"),
    "button": ("switch", "push button"),
    "switch": ("button", "push button"),
    "door": ("gate",),
    "handle": ("doorknob", "lever"),
}
"""Other words for a thing."""
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
ABSENT_THINGS = (
    "spoon", "fork", "knife", "towel", "phone", "key", "pen", "book", "shoe", "hat", "apple", "toy car", "chair",
    "lamp", "wrench", "keyboard", "sponge", "pear", "carrot", "bread", "watch",
    "camera", "pillow", "bucket", "brush", "rope", "candle", "guitar", "dog", "cat", "horse",
    "tree", "flower", "car", "bus", "ticket", "letter", "envelope", "ring", "coin", "battery", "remote control",
    "notebook", "ruler", "eraser", "glove", "jacket", "sandwich", "cookie", "egg", "cheese", "tomato",
    "doll", "puzzle", "chess piece", "ladder", "mirror", "clock", "comb", "soap", "lighter",
)  # fmt: skip
"""Things that stand in none of the scenes."""
CHAT = (
    "what a nice day", "tell me a joke", "who are you", "sing a song", "what time is it", "do you like music",
    "i am hungry", "where do you come from", "the weather is bad", "how old are you", "read me a story",
    "we are leaving soon", "call my mother", "i do not know", "never mind", "what is your name", "count to ten",
    "it is raining outside", "we talk about football", "he went home early", "the meeting starts at noon",
    "do nothing", "stay where you are", "wait a moment", "how interesting", "two and two is four",
)  # fmt: skip
"""Sentences that ask for nothing on the table."""
JOINS = ((" then "), (", then "), (" and then "), (", and then "), ("; afterwards "), (", afterwards "), (", next "))

KEPT_FOR_TESTS = re.compile(
    r"pick (?!up|out|hold)[^,]+ up$|please grab .+ from the table$|take .+ and lift it up$"
    r"|on (?!top)[^,]+? put the|lift .+ and move it to |please place .+ on |into [^,]+? drop |and put it into "
    r"|onto [^,]+? push |without lifting it slide|on top of [^,]+? stack |and set it on |pull open |please pull .+ out"
    r"|push shut|please shut|press .+ down$|please push down on|first .+ and then "
)
"""Forms in which the suites' held-out phrasings say things."""

_LISTS = (PICK, PLACE_VERBS, DROP_VERBS, PUSH_VERBS, STACK_VERBS, TAKE_VERBS, OPEN, CLOSE, PRESS, SIZES, BEFORE, AFTER,
          ABSENT_THINGS, CHAT, JOINS, *COLORS.values(), *THINGS.values(), *PLACES.values(), COLORS, THINGS)  # fmt: skip
VOCABULARY = frozenset(word for texts in _LISTS for text in texts for word in re.findall(r"[a-z']+", text))
"""Every word that a paraphrase may bring in, typos aside."""
