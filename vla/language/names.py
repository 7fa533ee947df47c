"""Other names for colours and things, and things that are not there, for the paraphrases that training hears.

No word here is one that the tests of unheard words use (tests hold that), and no name of a colour or thing stands for
another one of the suites' as well.
"""

from __future__ import annotations


def lists(text: str) -> dict[str, tuple[str, ...]]:
    """Lines "name: one, another, ..."; a line that is indented further goes on."""
    found: dict[str, tuple[str, ...]] = {}
    for part in text.replace("\n        ", " ").strip().splitlines():
        name, _, others = part.strip().partition(": ")
        found[name] = tuple(others.split(", "))
    return found


def _names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(" ".join(text.split()).split(", "))


COLORS: dict[str, tuple[str, ...]] = lists(
    """
    red: carmine, rosy red, blood red, red coloured, brick red, fire red, rust red, tomato red, maroon, burgundy,
        vermilion, cardinal, cerise, garnet, rouge, ruddy, claret, cinnabar, oxblood, russet, madder, alizarin, dark
        red, pale red, deep red
    green: lime, grass green, leaf green, green coloured, mint, forest green, olive green, pea green, moss,
        viridian, celadon, chartreuse, verdant, malachite, olive, sage, pistachio, avocado, peridot, verdigris, dark
        green, pale green, deep green
    blue: azure, sky blue, ocean blue, blue coloured, royal blue, ink blue, indigo blue, denim blue, cerulean,
        turquoise, teal, cyan, aqua, cornflower, lapis, zaffre, aquamarine, prussian blue, dark blue, pale blue, deep
        blue, baby blue
    yellow: amber, sunny yellow, yellow coloured, gold, mustard, honey yellow, butter yellow, straw, saffron, maize,
        flaxen, blonde, buttercup, primrose, citrine, ochre, topaz, dandelion, daffodil, dark yellow, pale yellow, deep
        yellow
    purple: lilac, mauve, purple coloured, deep purple, orchid, fuchsia, heather purple, wine purple, lavender,
        magenta, aubergine, eggplant, heliotrope, mulberry, wisteria, puce, byzantium, dark purple, pale purple
    black: jet black, ebony, dark, onyx, inky, sable, raven, charcoal, sooty, obsidian, blackish
    white: snow white, ivory, pale, alabaster, pearl, chalky, milky, snowy, eggshell, whitish, cream
    orange: tangerine, orange coloured, apricot, clementine, mandarin, papaya, persimmon
    brown: chestnut, chocolate brown, tan, beige, hazel, umber, sepia, walnut, mocha, taupe, brownish, bronze
    pink: rose, rosy, salmon, blush, bubblegum, pinkish, peony
    gray: grey, silver, slate, pewter, ash, gunmetal, grayish, greyish
    """
)
"""Other words for a colour."""
COLORED: dict[str, tuple[str, ...]] = lists(
    """
    red: blood, brick, rust, strawberry, tomato, wine, cranberry, raspberry, poppy, lava, pomegranate, ketchup,
        watermelon, lobster, paprika, rose, fire, flame, ladybird, chili, stop sign, fire engine, beet, radish,
        redcurrant, sunburn, lipstick, cayenne, brick wall, heart, robin, salsa, cranberries
    green: grass, leaf, forest, pine, fern, lime, mint, cucumber, seaweed, clover, basil, cactus, broccoli, spinach,
        pea, ivy, kiwi, lettuce, pickle, swamp, jungle, frog, parrot, asparagus, meadow, lizard, crocodile, cabbage,
        holly, caterpillar, lawn, hedge, parsley, christmas tree, zucchini, celery
    blue: sky, ocean, sea, ink, denim, ice, glacier, peacock, blueberry, lagoon, jeans, water, river, lake,
        bluebird, bluebell, whale, dolphin, forget me not, police, uniform, cornflower, wave, smurf, shark
    yellow: sun, banana, corn, butter, honey, mustard, straw, custard, cheese, chick, duckling, mango, turmeric,
        taxi, lemonade, egg yolk, sand, bee, school bus, wheat, dandelion, sulphur, mayonnaise, pollen, omelette
    purple: lilac, orchid, heather, iris, thistle, hyacinth, beetroot, blackberry, boysenberry, raisin, crocus, fig,
        pansy, red cabbage, clematis, prune, onion, bishop, turnip, elderberry, petunia
    black: coal, tar, night, ink, pitch, soot, crow, liquorice
    white: snow, milk, chalk, paper, ghost, sugar, salt, swan, cotton, flour
    orange: carrot, pumpkin, tangerine, fox, marigold
    brown: chocolate, coffee, mud, cocoa, caramel, wood, cinnamon, nut
    pink: flamingo, pig, carnation, candy, salmon
    gray: stone, concrete, elephant, smoke, steel, mouse, rain cloud
    """
)
"""Things that have a colour: "blood red", "blood coloured"."""
THINGS: dict[str, tuple[str, ...]] = lists(
    """
    cube: block, cuboid, building block, toy block, box shaped block, hexahedron, cubical thing, wooden block, lump,
        chunk, alphabet block, sugar cube, ice cube
    can: cylinder, soda can, drink can, beverage can, round can, keg, pillar, column, roll, soup can, food can,
        cylindrical thing, pot, jar, cask, paint can, metal can, tubular thing, cylindrical object, roller, tub, rod,
        pipe
    brick: bar, long brick, plank, long block, stick, board, timber, rectangular block, elongated block, rectangular
        thing, lath, girder, wooden bar, baton, strip, block of clay, long piece, gold bar, rectangle, batten
    ball: sphere, orb, globe, round ball, marble, bead, pearl, round thing, football, tennis ball, basketball, round
        object, spherical thing, toy ball, bubble, pellet, spheroid, pingpong ball, billiard ball, snowball, golf ball,
        dot, rubber ball
    bottle: flask, vial, carafe, phial, jug, decanter, water bottle, wine bottle, thermos, flagon, canteen, pitcher,
        ampoule, glass bottle, milk bottle, beer bottle, perfume bottle, cruet, plastic bottle, jug of water
    mug: cup, teacup, coffee mug, coffee cup, tankard, beaker, goblet, tumbler, stein, tea mug, drinking cup,
        chalice, cup with a handle, drinking vessel, beer mug, cocoa mug, drinking mug
    arch: bridge, archway, portal, gateway, vault, tunnel, viaduct, arcade, horseshoe, curved block, arched block,
        small bridge, arched thing, gate, doorway, thing with a hole, span, passage
    pyramid: steps, stepped pyramid, stair, stairs, staircase, ziggurat, stairway, flight of steps, triangle,
        pointed block, triangular thing, cone, stepped tower, temple, tower with steps, pyramid block, mound
    domino: tile, domino tile, flat tile, tablet, chip, wafer, slate, thin tile, domino piece, playing piece, thin
        block, flat piece, flake, counter, panel, thin plate, biscuit, small board, floor tile
    plate: saucer, platter, disc, round plate, dinner plate, charger, serving plate, paper plate, salver
    bowl: dish, basin, round bowl, soup bowl, salad bowl, tureen, cereal bowl, mixing bowl
    box: tray, crate, open box, case, carton, container, chest, bin
    bin: tray, crate, box, basket, container, waste bin
    zone: spot, area, patch, marked area, region, field, target area, marked spot
    drawer: desk drawer, compartment, cabinet drawer, pull out drawer, chest drawer
    button: switch, push button, push switch, knob, key switch, buzzer
    door: gate, cabinet door, hatch
    handle: doorknob, lever, knob, door handle
    block: cube, cuboid, building block, toy block
    cylinder: can, soda can, round can
    bar: brick, plank, long bar
    sphere: ball, orb, globe
    flask: bottle, vial, carafe
    cup: mug, teacup, coffee cup
    bridge: arch, archway, portal
    steps: pyramid, stepped pyramid, stair
    tile: domino, domino tile, flat tile
    dish: bowl, basin
    tray: box, crate
    spot: zone, area, patch
    switch: button, push button
    """
)
"""Other words for a thing."""
ABSENT_THINGS = _names(
    """
    spoon, fork, knife, towel, phone, pen, book, shoe, hat, apple, toy car, chair, lamp, wrench, keyboard, sponge,
    pear, carrot, bread, watch, camera, pillow, bucket, brush, rope, candle, guitar, dog, cat, horse, tree, flower,
    car, bus, ticket, letter, envelope, ring, coin, battery, remote control, notebook, ruler, eraser, glove, jacket,
    sandwich, cookie, egg, cheese, tomato, doll, puzzle, chess piece, ladder, mirror, clock, comb, soap, lighter,
    banana, hammer, potato, onion, bag, shirt, blanket, newspaper, magazine, pencil, tape, plant, shovel, broom,
    drill, saw, plier, pliers, bolt, screw, nail, laptop, mouse, cable, headphones, razor, bike, bicycle, truck,
    train, airplane, boat, rabbit, duck, chicken, fish, pizza, burger, hotdog, donut, cake, pie, steak, lettuce,
    cucumber, pepper, garlic, mushroom, strawberry, melon, pan, kettle, toaster, oven, fridge, microwave, blender,
    teapot, napkin, curtain, carpet, sofa, couch, table, bed, shelf, window, cushion, magnet, balloon, kite, helmet,
    boot, slipper, belt, tie, scarf, dress, shorts, trousers, purse, suitcase, backpack, wheel, tire, engine, motor,
    propeller, antenna, speaker, microphone, radio, television, printer, scanner, router, stove, sink, faucet,
    bathtub, toilet, shampoo, lotion, medicine, pill, syringe, bandage, stethoscope, microscope, telescope,
    binoculars, compass, map, flag, trophy, medal, crown, necklace, bracelet, earring, violin, piano, drumstick,
    trumpet, flute, harmonica, tambourine, racket, skateboard, surfboard, dumbbell, whistle, anchor, paddle, tricycle,
    scooter, helicopter, rocket, tractor, crane, wagon, trolley, mailbox, fence, hose, rake, axe, pitchfork,
    wheelbarrow, seed, leaf, acorn, seashell, skull, candleholder, matchstick, ashtray, cigarette, corkscrew, whisk,
    spatula, ladle, grater, colander, apron, noodle, rice, bean, walnut, almond, peanut, raisin, popcorn, pretzel,
    waffle, pancake, bacon, sausage, ham, salami, yogurt, icecream, lollipop, jelly, syrup, vinegar, monkey, tiger,
    lion, zebra, giraffe, penguin, owl, spider, snake, turtle, crab, squirrel, hamster, dinosaur, dragon, unicorn,
    snowman, angel, clown, soldier, pirate
    """
)
"""Things that stand in none of the scenes."""
CHAT = _names(
    """
    what a nice day, tell me a joke, who are you, sing a song, what time is it, do you like music, i am hungry, where
    do you come from, the weather is bad, how old are you, read me a story, we are leaving soon, call my mother, i do
    not know, never mind, what is your name, count to ten, it is raining outside, we talk about football, he went home
    early, the meeting starts at noon, do nothing, stay where you are, wait a moment, how interesting, two and two is
    four, the printer is out of paper, my sister lives in london, open your mouth, look out of the window, the train
    is late, turn on the radio, switch off the lights, did you sleep well, i lost my keys, where is the bathroom,
    please write an email, dance with me, it was a long day, water the plants, feed the dog, the concert was great,
    nobody knows why, be quiet, come here, thank you very much, you are welcome, happy birthday, clean the kitchen,
    cook some rice, drive me to work, buy some milk, close your eyes, answer the phone, i love summer, she reads a
    book, play the next song, volume down, show me the news, how do you do, what happened yesterday, the film starts
    at eight, i will think about it, maybe tomorrow, let it be, good night, the dog barks, rest for a while, turn
    around, walk three steps, say your name, repeat after me, tell us about yourself, is it raining
    """
)
"""Sentences that ask for nothing on the table."""
CHAT_ABOUT = _names(
    """
    do you have a {}, i bought a {} last week, my {} is broken, where did you leave your {}, our neighbour sold his {},
    is there a {} in town, we need another {}, she forgot her {} at school, tell us about your {}, how big is a {},
    i dreamt of a {}, have you ever seen a {}, they gave me a {}, who invented the {}, i cannot find any {},
    a {} costs too much, my father likes every {}, your {} is wonderful, the children want a {}, never trust a {}
    """
)
"""The same, about something that is not there."""
NEUTRAL_THINGS = _names(
    """
    one, thing, object, piece, article, gadget, gizmo, toy, element, unit, widget, contraption, specimen, artifact,
    trinket, knickknack, doodad, bit, example, product, prop, part, sample, treasure, bauble, body, form, shape,
    solid, figure, target, goal, whatsit, thingy, device, utensil, oddment, material, structure, novelty, curio,
    creation, invention, possession, souvenir, entity, matter, substance, gear, equipment, merchandise, belonging,
    component, accessory, member, model, kind of thing, sort of object
    """
)
"""Words for a thing that tell nothing of its kind."""
NEUTRAL_LOOKS = _names(
    """
    shiny, glossy, matte, smooth, rough, hard, solid, heavy, old, new, nice, pretty, lovely, beautiful, ugly, clean,
    dirty, wooden, plastic, wet, dry, expensive, cheap, broken, favourite, lonely, funny, simple, strange, famous,
    important, interesting, beloved, precious, dusty, sturdy, fragile, sleek, cute, awesome, charming, ordinary,
    curious, certain, aforementioned, mentioned, requested, desired, correct, chosen, lone, single, very, handsome,
    adorable, sticky, slippery, hollow, cold, warm, quiet, ancient, modern, weird, fancy, plain, colourful,
    decorated, rugged, delicate, antique, genuine, perfect, excellent, wonderful, terrible, boring, sweet, clever,
    innocent, lucky, magic, royal, secret, useful, useless, valuable, worthless, good, great, fine, real, fake,
    strong, weak, elegant, cozy, odd, peculiar, remarkable, splendid, superb, typical, usual, visible, obvious,
    remaining, particular, specific, given
    """
)
"""Qualities that tell nothing of a thing's colour or kind."""
