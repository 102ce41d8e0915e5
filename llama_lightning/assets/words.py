"""The words and facts of the tiny model's closed world: every one is a token of its own."""

CATEGORIES = {
    "animal": "dog cat horse cow pig sheep duck bee lion bear frog goat",
    "fruit": "apple pear plum peach lemon grape cherry melon mango",
    "colour": "red blue green black white yellow pink brown",
    "tool": "hammer saw drill axe shovel rake wrench",
    "garment": "shirt coat hat shoe sock glove scarf belt",
    "vehicle": "car bus train boat plane truck bike ship",
    "instrument": "piano guitar drum violin flute harp trumpet",
    "job": "doctor teacher farmer baker nurse pilot singer",
    "furniture": "chair table bed desk sofa shelf lamp",
}
MEMBERS = {name: words.split() for name, words in CATEGORIES.items()}
NOUNS = [word for words in MEMBERS.values() for word in words]
CATEGORY = {word: name for name, words in MEMBERS.items() for word in words}


def _pairs(text: str) -> dict[str, str]:
    """Read `key value key value ...` into a dictionary."""
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


CAPITALS = _pairs(
    "France Paris Italy Rome Spain Madrid Germany Berlin England London Greece Athens Egypt Cairo "
    "Japan Tokyo China Beijing Russia Moscow Poland Warsaw Austria Vienna Norway Oslo Sweden "
    "Stockholm Finland Helsinki Ireland Dublin Portugal Lisbon Cuba Havana Peru Lima Kenya Nairobi "
    "Canada Ottawa Turkey Ankara Iran Tehran Iraq Baghdad Hungary Budapest Denmark Copenhagen "
    "Belgium Brussels Chile Santiago Nepal Kathmandu Thailand Bangkok Vietnam Hanoi Ukraine Kyiv"
)
_ONE_WAY = _pairs(
    "hot cold big small fast slow old young tall short rich poor early late full empty hard soft "
    "light dark open closed strong weak happy sad clean dirty wet dry high low near far long brief "
    "loud quiet sweet sour thick thin wide narrow good bad day night up down left right"
)
OPPOSITES = _ONE_WAY | {value: key for key, value in _ONE_WAY.items()}
PLURALS = _pairs(
    "child children foot feet tooth teeth mouse mice goose geese man men woman women leaf leaves "
    "knife knives wolf wolves wife wives box boxes bus buses fox foxes cherry cherries baby babies "
    "city cities lady ladies dog dogs cat cats apple apples car cars hat hats coat coats king "
    "kings book books cup cups ball balls tree trees bed beds chair chairs shoe shoes hero heroes"
)
PASTS = _pairs(
    "go went eat ate run ran sing sang swim swam drink drank write wrote give gave speak spoke "
    "think thought bring brought teach taught sleep slept keep kept feel felt leave left fly flew "
    "grow grew know knew throw threw win won sit sat begin began fall fell make made come came "
    "say said tell told sell sold send sent build built lose lost play played walk walked"
)
YOUNG = _pairs(
    "dog puppy cat kitten cow calf horse foal sheep lamb pig piglet duck duckling bear cub goat "
    "kid frog tadpole hen chick kangaroo joey swan cygnet goose gosling deer fawn owl owlet"
)
SOUNDS = _pairs(
    "dog barks cat meows cow moos lion roars duck quacks pig oinks sheep bleats horse neighs bee "
    "buzzes frog croaks owl hoots wolf howls snake hisses hen clucks mouse squeaks donkey brays"
)
# English noun, French article and noun, Spanish article and noun.
_NOUNS_ABROAD = (
    "dog le chien el perro|cat le chat el gato|horse le cheval el caballo|book le livre el libro|"
    "bread le pain el pan|garden le jardin el jardín|boat le bateau el barco|cheese le fromage el "
    "queso|hat le chapeau el sombrero|bridge le pont el puente|glass le verre el vaso|house la "
    "maison la casa|door la porte la puerta|moon la lune la luna|flower la fleur la flor|key la "
    "clé la llave|chair la chaise la silla|shirt la chemise la camisa|kitchen la cuisine la "
    "cocina|street la rue la calle|table la table la mesa|window la fenêtre la ventana"
)
ABROAD = {row.split()[0]: row.split()[1:] for row in _NOUNS_ABROAD.split("|")}
# English colour, then French and Spanish, masculine before feminine.
_COLOURS_ABROAD = (
    "black noir noire negro negra|white blanc blanche blanco blanca|green vert verte verde verde|"
    "blue bleu bleue azul azul|red rouge rouge rojo roja|yellow jaune jaune amarillo amarilla"
)
COLOURS = {row.split()[0]: row.split()[1:] for row in _COLOURS_ABROAD.split("|")}
# The verb's plain form: the forms for "she ...", "she ... yesterday" and "it is ... by her".
VERBS = {
    row.split()[0]: row.split()[1:]
    for row in (
        "see sees saw seen|take takes took taken|break breaks broke broken|draw draws drew drawn|"
        "find finds found found|wash washes washed washed|paint paints painted painted|buy buys "
        "bought bought|push pushes pushed pushed|carry carries carried carried"
    ).split("|")
}
PEOPLE = "boy girl man woman doctor farmer teacher baker king queen".split()
THINGS = "ball book box cup door chair table car boat lamp bike picture".split()
TIMES = {"two": 2, "three": 3, "four": 4, "five": 5}
TEENS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
