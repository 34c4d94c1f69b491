"""Make models/tiny-qwen3: a Qwen3 of 11.5 M parameters, trained from scratch to read a list of tools and call one.

    python models/make_tiny_qwen3.py --output models/tiny-qwen3                      # one H200, about 7 minutes
    python models/make_tiny_qwen3.py --output /tmp/smoke --steps 20 --rows 2         # smoke test on a CPU

A newcomer fine-tunes this base on a laptop and sees the whole job succeed. It has never read real text. All it
knows is what the conversations below teach: find the tool that a request means, copy the values into JSON, leave
out what was not said. Every conversation is about freshly invented tools, so the only way to answer is to read.
"""

import argparse
import json
import math
import os
import random
import re
import time
from pathlib import Path

# ── 1. Settings ──────────────────────────────────────────────────────────────────────────────────────────────────

VOCABULARY_SIZE = 4096          # small: every token is then seen often enough to get a good embedding
TOKENIZER_GROUPS = 6000         # groups of conversations that the tokenizer is trained on
ROW_LENGTH = 2048               # tokens in one row of a batch, and the longest position that is trained
MODEL_SHAPE = dict(             # every size is a multiple of 64, as 4-bit quantization in blocks of 64 wants it
    hidden_size=320,
    num_hidden_layers=8,
    num_attention_heads=5,
    num_key_value_heads=5,
    head_dim=64,
    intermediate_size=896,
)
LEARNING_RATE = 3e-3
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.05
MUON_MOMENTUM = 0.95
MAX_GRAD_NORM = 1.0

# Qwen3's added tokens in Qwen3's order. The flag says whether decoding with skip_special_tokens hides the token.
CONTROL_TOKENS = [
    ("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True),
    ("<|object_ref_start|>", True), ("<|object_ref_end|>", True), ("<|box_start|>", True), ("<|box_end|>", True),
    ("<|quad_start|>", True), ("<|quad_end|>", True), ("<|vision_start|>", True), ("<|vision_end|>", True),
    ("<|vision_pad|>", True), ("<|image_pad|>", True), ("<|video_pad|>", True),
    ("<tool_call>", False), ("</tool_call>", False),
    ("<|fim_prefix|>", False), ("<|fim_middle|>", False), ("<|fim_suffix|>", False), ("<|fim_pad|>", False),
    ("<|repo_name|>", False), ("<|file_sep|>", False),
    ("<tool_response>", False), ("</tool_response>", False), ("<think>", False), ("</think>", False),
]
IGNORED = -100                  # the label that PyTorch's cross entropy leaves out

# ── 2. Words ─────────────────────────────────────────────────────────────────────────────────────────────────────

# Plain words give descriptions and requests an English look, and give the tokenizer whole words to learn.
PLAIN_WORDS = """
able above accept account across act add address admit adult advice afraid after again age agree air alive all allow
almost alone along already also always amount ancient anger angle animal answer any apart apple apply area argue arm
army around arrive art ask asleep attack autumn average awake aware away baby back bad bag bake balance ball band bank
bar bare base basket bath battle beach bean bear beat beauty become bed bee before begin behave behind bell belong below
belt bend best better between big bike bill bird birth bite black blanket blind block blood blow blue board boat body
boil bold bone book border borrow both bottle bottom bowl box boy brain branch brave bread break breakfast breath
brick bridge brief bright bring broad brother brown brush bucket build burn bus bush busy butter button buy cabin cake
call calm camp can candle cap car card care careful carry case castle cat catch cause cell chain chair chance change
charge chase cheap check cheese chest chicken child choose circle city clay clean clear clever client climb clock close
cloth cloud club coach coast coat code coffee coin cold collect color column come common company compare complete
connect contain control cook cool copper copy corn corner correct cost cotton cough count country couple course court
cousin cover cow crack cream create cross crowd cry cup current curtain curve customer cut daily dance danger dark data
date daughter dead deal dear decide deep deer degree delay delete deliver dentist depend desert desk detail device dig
dinner direct dirt dirty dish distance divide doctor dog dollar door double doubt down draw dream dress drink drive drop
dry duck due dull dust duty each ear early earn earth ease east easy eat edge egg eight either electric elephant eleven
else email empty end enemy energy engine enjoy enough enter equal escape even evening event ever every evil exact
example except excite exercise exit expect explain extra eye face fact fail fair fall false family famous fan far farm
fast fat father fault fear feather feed feel female fence fetch fever few field fight file fill film final find fine
finger finish fire first fish fit five fix flag flat flight float floor flour flow flower fly fold follow food foot
force forest forget fork form forward four fox frame free freeze fresh friend front frost fruit fuel full fun funny
future game garage garden gate gather gentle gift girl give glad glass glove go goal goat gold good goose grain grand
grandma grandpa grass gray great green ground group grow guard guess guest guide guitar gun gym hair half hall hammer
hand happen happy hard hat hate have head health hear heart heat heavy height hello help hen here hide high hill history
hit hobby hold hole holiday hollow home honest honey hope horse hospital host hot hotel hour house how huge human hundred
hungry hunt hurry hurt husband ice idea ill image important inch increase ink insect inside instead invite iron island
item jacket jar job join joke journey joy judge juice jump just keen keep key kick kid kind king kiss kitchen knee knife
knock know label ladder lady lake lamp land language large last late laugh law lay lazy lead leaf learn leave left leg
lemon lend length lesson let letter level library lid lie life lift light like limit line lion lip list listen litre
little live load local lock long look loose lose lot loud love low lower luck lunch machine mail main make male man many
map mark market marry master match matter may meal mean measure meat medicine meet meeting melt member memory mend
message metal middle might mile milk mind minute mirror miss mistake mix model modern mom moment monday money monkey
month moon more morning most mother mountain mouse mouth move much mud museum music must nail name narrow nation nature
near neat neck need needle neighbor neither nephew nest net never new news next nice niece night nine noise none noon
nor north nose note nothing notice now number nurse nut obey object ocean offer office often oil old once one onion only
open opposite orange order other our out outside oven over own owner page pain paint pair pan paper parcel parent park
part partner party pass past path patient pause pay peace pen pencil people pepper perfect period person phone photo
piano pick picture piece pig pilot pin pink pipe place plain plan plane plant plastic plate play please plenty plug
pocket poem point poison police polite pool poor popular port position possible post pot potato pound pour powder power
practice prepare present press pretty prevent price print private prize problem produce project promise proper protect
proud prove public pull pump pupil purple push put queen question quick quiet quite rabbit radio rail rain raise range
rapid rat rate raw reach read ready real reason receive record red regular relax remain remember remind remove rent
repair repeat reply report rest result return rice rich ride right ring rise risk river road rob rock roll roof room
root rope rose rough round row royal rub rubber rude rule ruler run rush sad saddle safe sail salad salt same sand
saturday sauce save say scale school science score scratch screen sea search season seat second secret section see seed
seem sell send sense serve set seven shade shadow shake shape share sharp sheep sheet shelf shell shine ship shirt shoe
shoot shop short shoulder shout show shower shut sick side sign silent silver simple sing single sink sister sit six
size skill skin skirt sky sleep slice slide slip slow small smart smell smile smoke smooth snake snow soap sock soft soil
soldier solid solve some son song soon sort soul sound soup south space spare speak special speed spell spend spice
spoon sport spread spring square stage stair stamp stand star start state station stay steal steam steel step stick
still stomach stone stop store storm story strange street stretch strict string strong student study stuff stupid sugar
suit summer sun sunday supper supply sure surprise sweep sweet swim switch table tail take talk tall tap task taste taxi
tea teach team tear tell ten tennis tent test thank then thick thief thin thing think third thirst thousand thread
three throat throw thunder thursday ticket tidy tie tiger tight till timber tin tiny tire title toe together tomato
tomorrow tongue tonight tool tooth top total touch tough tour towel tower town toy track trade traffic train travel
tray treat tree trip trouble truck true trust try tube tuesday turn twelve twenty twice twin two type ugly uncle under
understand unit until up upper upset urgent use useful usual valley value vase vegetable verb very view village visit
visitor voice wait wake walk wall want war warm wash waste watch water wave way weak wear wedding wednesday week weight
welcome well west wet wheel when white whole wide wife wild will win wind window wine wing winter wire wise wish wolf
woman wonder wood wool word work world worry worse worth wound write wrong yard year yellow yesterday yet young zero zoo
""".split()
# Words of one line are close in meaning: a request may say one where the tool says another.
RELATED_WORDS = [line.split() for line in """
begin start launch open initiate commence
stop end finish halt cease quit terminate
make create build produce construct generate compose
buy purchase order acquire get procure
sell trade vend auction
send deliver mail ship dispatch forward transmit
find search seek locate discover lookup
show display view present reveal
delete remove erase discard drop clear
change modify edit alter update adjust revise
add append include insert attach
check verify inspect examine test validate
write note record log jot
read browse scan study review
say speak tell talk announce mention
ask request inquire query question
answer reply respond response
repair fix mend restore patch
increase raise boost lift grow
decrease lower reduce shrink cut
move shift transfer carry relocate
measure gauge weigh assess
compare contrast match rank
join connect link combine merge unite
split divide separate break
save store keep preserve archive backup
close shut lock seal
cook bake roast fry boil grill
clean wash wipe scrub rinse
play perform game sport
listen hear sound audio noise
music song tune melody track
picture photo image snapshot
film movie video clip
book novel volume
letter message text mail
phone telephone mobile cell
computer laptop machine device
car vehicle auto truck
taxi cab ride
train rail railway
plane flight aircraft jet
ship boat vessel ferry
road street lane path route
house home dwelling residence
room chamber space hall
kitchen galley
bed bedroom sleep nap rest
lamp light bulb lantern
chair seat bench stool
table desk counter
door gate entrance
window pane
shop market store mall
food meal dish snack
bread toast loaf bun
fruit apple pear plum
vegetable carrot potato onion
drink beverage juice
coffee espresso latte
money cash coin fund
price cost fee charge rate
dollar buck
bank account deposit
bill invoice receipt
job work task duty chore
meeting session conference appointment
party celebration feast
trip journey travel tour voyage
hotel inn hostel lodge
city town village
country nation state
weather climate forecast
rain shower drizzle
snow frost ice
wind breeze storm gale
hot warm heated
cold cool chilly
big large huge great giant
small little tiny mini
fast quick rapid swift
slow gradual
happy glad cheerful merry
sad unhappy gloomy
angry mad furious
good fine nice excellent
bad poor awful terrible
new fresh recent modern
old ancient aged
loud noisy
quiet silent calm
bright shiny vivid
dark dim dull
easy simple plain
hard difficult tough
red crimson scarlet
blue azure navy
green lime olive
yellow gold amber
day daily date
week weekly
month monthly
year yearly annual
hour hourly
clock watch timer
alarm alert warning
calendar schedule agenda plan
memo reminder
friend pal buddy mate
mother mom mum
father dad
child kid
doctor physician medic
teacher tutor coach
student pupil
boss chief manager leader
person human individual
crowd group team crew
dog puppy hound
cat kitten
bird sparrow crow
fish salmon trout
tree oak pine
flower rose tulip
garden yard lawn
mountain hill peak
river stream creek
lake pond pool
sea ocean
island isle
map chart atlas
name title label
number count amount quantity total
size volume extent
weight mass
length distance
height altitude
speed pace velocity
heat temperature
degree celsius
language tongue speech
word term
sentence phrase
story tale
paper page sheet
pen pencil
box case crate
bag sack
cup mug glass
key code password
user member client customer
guest visitor
owner holder
place location site spot
region area zone
border edge limit
middle center core
top summit
bottom base
left port
front face
back rear
""".strip().splitlines()]
RELATIVES = {word: line for line in RELATED_WORDS for word in line}
PLAIN_WORDS = sorted(set(PLAIN_WORDS) | set(RELATIVES) | set("""
artist album singer band playlist volume channel station podcast bedroom bathroom hallway living dining basement attic
balcony fridge freezer heater fan sensor thermostat socket cable monitor keyboard printer app folder document contract
report slide draft inbox contact recipient sender attendee passenger driver pilot pickup dropoff fare luggage passport
visa booking reservation deadline weekday weekend january february march april june july august september october
november december currency euro pound rupee percent kilo gram mile inch gallon liter shopping grocery pantry recipe
ingredient organic frozen lettuce spinach banana cucumber pasta noodle shampoo detergent napkin battery umbrella
backpack suitcase guitar piano yoga tennis football chess running swimming therapy budget marketing design security
project review workshop lesson class practice training exercise wedding birthday anniversary museum theater cinema
airport harbor stadium library pharmacy bakery studio reception mirror shadow diamond thunder highway stranger
paradise golden midnight electric velvet crystal lonely burning hidden distant lucky sacred color purple pink orange
brightness level mode status option setting value item list entry unit type field source target origin destination
forward every once twice again repeat loop whole half quarter double single couple dozen several enough mute notify
remind snooze cancel confirm assign approve reject publish upload download install convert translate calculate
estimate summarize organize arrange collect distribute evaluate manage monitor predict prevent protect recommend
register replace reserve resolve rotate sort submit subscribe suggest supply switch sync toggle upgrade verify wake
""".split()))
GLUE_WORDS = """a an the of to in on at by for with from as is it this that my your our me us we be do and or but so not
if its into onto about per via than under over up out off i you he she they them his her their there here was are has had
will would can could should may just some any every""".split()
FILLERS = "well so ok hmm look right listen oh um see yo now".split()
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen""".split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
SCHEMA_WORDS = """name arguments type function description parameters properties required string integer number boolean array
object items enum minimum maximum tools call user time times second seconds minute minutes hour hours day days hundred
thousand point past quarter half noon midnight morning afternoon evening clock dozen couple percent"""
ACCENTED = "áéíóúüñçößåøčšžğıêàèôłæ"

# What a person says before and after the request itself. The texts of data/ have none of these frames.
OPENERS = [
    "", "", "", "", "", "", "", "", "", "", "", "", "", "", "", "", "", "", "we need", "go for", "perform", "one", "kindly do", "run", "trigger", "it is time for", "requesting",
    "i am after", "proceed with", "launch", "have it do", "carry out", "another", "apply", "invoke", "someone wants",
    "next up", "job", "execute", "make use of", "what about", "is it ok to do", "they asked for", "do", "the", "a",
]
CLOSERS = [
    "", "", "", "", "", "", "", "", " over", " if it works", " as agreed", " and be quick about it", " today of all days",
    " for the record", " that is all", " cheers", " in short", " and nothing more", " pls", " thx", " ok",
]
# What stands before the request and has nothing to do with it.
LEADS = ["my {a} is {b}", "the {a} broke", "a {a} came by", "after the {a} {b}", "no more {a}", "{a} and {b} are here", "as the {a} went {b}",
         "we had {a}", "given the {b} {a}", "it is all {a}", "they {a} a {b}", "too much {a}", "the {b} of {a} again", "{a} knows", "in view of {a}"]
# {c} is a cue word of the parameter (from its name or its description), {s} the value as a person says it, {g} glue.
# Short values (a number, a time, an option) are known by their look, so words may stand on both sides of them.
SHORT_NAMED = ["{c} {s}", "{c} {s}", "{c} = {s}", "{c}: {s}", "with {c} {s}", "{c} is {s}", "{s} as {c}", "{s} for {c}", "{s} {c}",
               "{s} {c}", "using {s} as its {c}", "whose {c} equals {s}", "the {c} being {s}", "{c} {g} {s}", "{s} {g} {c}", "{c} set at {s}"]
SHORT_BARE = ["{s}", "{s}", "with {s}", "for {s}", "at {s}", "to {s}", "on {s}", "by {s}", "in {s}", "from {s}", "{g} {s}", "{s} {g}",
              "about {s}", "until {s}", "of {s}", "as {s}", "around {s}", "before {s}"]
# Names, titles and messages are told from the words around them only by where they begin and end.
LONG_NAMED = ["{c} {s}", "{c} {s}", "{c} {s}", "{c} = {s}", "{c}: {s}", "with {c} {s}", "{c} is {s}", "and {c} {s}", "the {c} being {s}",
              "whose {c} equals {s}", "{c} should read {s}", "with {s} as {c}", "using {s} as its {c}", "for {s} as {c}", "{c} set at {s}"]
LONG_BARE = ["{s}", "with {s}", "for {s}", "to {s}", "by {s}", "in {s}", "from {s}", "about {s}", "of {s}", "as {s}", "that {s}", "on {s}", "the {s}"]
TRUE_MENTIONS = ["{c} on", "with {c}", "{c}", "and {c} too", "{c} yes", "make it {c}", "{c} enabled", "also {c}", "{c} please"]
FALSE_MENTIONS = ["{c} off", "without {c}", "no {c}", "not {c}", "{c} no", "skip {c}", "do not {c}", "{c} disabled", "minus the {c}"]
JOINERS = [" and ", " then ", ", ", " plus ", "; ", ". ", " and also ", ", then ", ". after that ", " & ", ", and ", " together with "]
CHATTER = [
    "what is a {a} {b}", "a {a} and a {b} walk into a {c}", "who made the {a}", "you are {a}", "i had a {a} {b}", "why is {a} so {b}",
    "many thanks to all", "greetings", "bye", "ha ha {a}", "that was {a}", "is {a} better than {b}", "my {a} is {b}", "{a}?", "{a} {b} {c}",
    "explain {a}", "tell of the {a} {b}", "do you {a}", "how does {a} {b}", "nice {a}", "describe {a} in {b} words", "let it be",
]
REPLIES = [
    "No tool here covers {a}.", "I have nothing for {a}.", "None of my tools can do that.", "That is outside of my tools.",
    "Gladly, tell me more.", "You are welcome.", "I only handle what my tools offer.", "A warm welcome to you.", "I would say {a}.",
    "Sadly I cannot {a}.", "There is no tool for that.", "Good question about {a}.", "My tools do not reach {a}.", "Noted.",
]
QUESTIONS = ["Which {a}?", "Tell me the {a} first.", "I still need the {a}.", "And the {a}?"]
SYSTEM_TEXTS = ["You are a {a} helper.", "Be {a} and {b}.", "You work for the {a} {b}.", "Answer in a {a} way. Mind the {b}."]


def letter_model(words):
    """Return {two letters: the letters that follow them in words}, with ^ before and $ after each word."""
    follow = {}
    for word in words:
        padded = "^^" + word + "$"
        for i in range(len(padded) - 2):
            follow.setdefault(padded[i:i + 2], []).append(padded[i + 2])
    return follow


LETTER_MODEL = letter_model(PLAIN_WORDS)
FRAME_WORDS = sorted(set(re.findall("[a-z]+", " ".join(
    OPENERS + CLOSERS + FILLERS + LEADS + TRUE_MENTIONS + FALSE_MENTIONS + CHATTER + REPLIES + QUESTIONS + SYSTEM_TEXTS + ONES + TENS + [SCHEMA_WORDS]
).lower())))


def made_up_word(rng):
    """Return a word that does not exist: English-looking, now and then random letters or accented."""
    style = rng.random()
    if style < 0.12:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 7)))
    word, pair = "", "^^"
    while len(word) < 11:
        letter = rng.choice(LETTER_MODEL[pair])
        if letter == "$":
            if len(word) > 2:
                break
            letter = rng.choice("aeiou")
        word += letter
        pair = pair[1] + letter
        if pair not in LETTER_MODEL:
            break
    if style < 0.15:
        i = rng.randrange(len(word))
        word = word[:i] + rng.choice(ACCENTED) + word[i + 1:]
    elif style < 0.25:
        word += rng.choice(["ing", "er", "ed", "ly", "tion", "ment", "ness", "able", "ful", "ist", "ize", "ism", "ive", "al"])
    return word


def any_word(rng):
    """Return a plain word, a made-up one, or one that also stands in the frames: no word has only one role."""
    style = rng.random()
    return rng.choice(PLAIN_WORDS) if style < 0.55 else rng.choice(FRAME_WORDS) if style < 0.6 else made_up_word(rng)


def glue_word(rng):
    """Return a small word that carries no meaning here."""
    return rng.choice(GLUE_WORDS) if rng.random() < 0.8 else any_word(rng)


def misspell(word, rng):
    """Return the word with one letter lost, doubled, swapped or replaced, or with another ending."""
    if len(word) < 4:
        return word
    i = rng.randrange(1, len(word) - 1)
    return rng.choice([
        word[:i] + word[i + 1:], word[:i] + word[i] + word[i:], word[:i] + word[i + 1] + word[i] + word[i + 2:],
        word[:i] + rng.choice("aeioustnrl") + word[i + 1:], word + "s", word + "ing", word + "ed", word[:-1],
    ])


def family(word):
    """Return the word and the words close to it in meaning."""
    return {word, *RELATIVES.get(word, [])}


def say_word(word, noise, rng):
    """Return a cue word as a request may say it: the word, a related one, in capitals, or misspelled."""
    if word in RELATIVES and rng.random() < 0.35:
        word = rng.choice(RELATIVES[word])
    if rng.random() < noise:
        word = misspell(word, rng)
    style = rng.random()
    return word.title() if style < 0.05 else word.upper() if style < 0.06 else word


def sentence(rng, low, high):
    """Return low to high words, some of them glue."""
    return " ".join(glue_word(rng) if rng.random() < 0.4 else any_word(rng) for _ in range(rng.randint(low, high)))


# ── 3. Values: what a person says, and what belongs into the call ────────────────────────────────────────────────



def number_in_words(n, rng):
    """Return 0 <= n < 10000 in words, e.g. 'two hundred and five' or 'forty-two'."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (rng.choice([" ", " ", "-"]) + ONES[n % 10] if n % 10 else "")
    unit, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    head = "a" if n // unit == 1 and rng.random() < 0.5 else number_in_words(n // unit, rng)
    tail = rng.choice([" and ", " "]) + number_in_words(n % unit, rng) if n % unit else ""
    return f"{head} {name}{tail}"


def integer_value(rng):
    """Return (spoken, integer)."""
    n = rng.choice([rng.randint(0, 12), rng.randint(0, 60), rng.randint(0, 100), rng.randint(0, 999), 5 * rng.randint(0, 40),
                    100 * rng.randint(1, 60), rng.randint(1000, 9999)])
    style = rng.random()
    if style < 0.03:
        return rng.choice([("a dozen", 12), ("a couple", 2), ("a couple of", 2), ("half a dozen", 6), ("a pair of", 2), ("a", 1), ("a single", 1)])
    if style < 0.45:
        return number_in_words(n, rng), n
    if style < 0.49:
        return f"minus {n}" if n else "zero", -n
    if style < 0.53:
        return rng.choice([f"{n}%", f"{n} percent", f"${n}", f"€{n}", f"£{n}", f"{n}x"]), n
    if n >= 1000 and style < 0.65:
        return f"{n:,}", n
    return str(n), n


def decimal_value(rng):
    """Return (spoken, number with at most two decimals)."""
    n, style = rng.choice([rng.randint(0, 9), rng.randint(1, 40), rng.randint(0, 300)]), rng.random()
    if style < 0.12:
        return f"{number_in_words(n, rng)} and a half" if n else "half a", n + 0.5
    if style < 0.3:
        digit = rng.randint(1, 9)
        return f"{number_in_words(n, rng)} point {ONES[digit]}", float(f"{n}.{digit}")
    if style < 0.35:
        return rng.choice([("three quarters", 0.75), ("a quarter", 0.25), ("a half", 0.5), ("one and a quarter", 1.25)])
    if style < 0.5:
        return integer_value(rng)
    text = f"{n}.{rng.randint(1, 9)}" if rng.random() < 0.6 else f"{n}.{rng.randint(0, 9)}{rng.randint(1, 9)}"
    return text, float(text)


def part_of_day(hour, rng):
    """Return words that place the hour in the day."""
    if hour < 12:
        return rng.choice([" am", "am", " a.m.", " in the morning", " AM"])
    if hour < 18:
        return rng.choice([" pm", "pm", " p.m.", " in the afternoon", " PM"])
    return rng.choice([" pm", "pm", " p.m.", " in the evening", " at night", " PM"])


def clock_value(rng):
    """Return (spoken, 'HH:MM' on the 24-hour clock)."""
    hour = rng.randint(0, 23)
    minute = rng.choice([0, 0, 0, 30, 30, 15, 45, 5 * rng.randint(0, 11), rng.randint(0, 59)])
    value, style = f"{hour:02}:{minute:02}", rng.random()
    if style < 0.03:
        return rng.choice([("noon", "12:00"), ("midday", "12:00"), ("midnight", "00:00")])
    if style < 0.2:
        return rng.choice([value, value, value.replace(":", "."), f"{hour}:{minute:02}"]), value
    # Without a part of the day the hour is taken as said; with one, 12-hour speech is turned into the 24-hour clock.
    said, day = (hour, "") if hour <= 12 and hour and rng.random() < 0.3 else (hour % 12 or 12, part_of_day(hour, rng))
    if style < 0.5:
        return (f"{said}{day}" if minute == 0 and day else f"{said}:{minute:02}{day}"), value
    spoken_hour, next_hour = ONES[said], ONES[said % 12 + 1]
    if rng.random() < 0.15:
        spoken_hour, next_hour = str(said), str(said % 12 + 1)
    if minute == 0:
        return spoken_hour + rng.choice([" o'clock", " oclock", "", " sharp"] if day else [" o'clock", " oclock", " sharp"]) + day, value
    if minute in (15, 30, 45) and style < 0.85:
        words = {15: f"quarter past {spoken_hour}", 30: f"half past {spoken_hour}", 45: f"quarter to {next_hour}"}[minute]
        return rng.choice(["", "", "a "] if minute != 30 else [""]) + words + day, value
    if style < 0.75:
        past = f"{number_in_words(minute, rng)} past {spoken_hour}" if minute <= 30 else f"{number_in_words(60 - minute, rng)} to {next_hour}"
        return past + day, value
    return f"{spoken_hour} {'oh ' if minute < 10 else ''}{number_in_words(minute, rng)}{day}", value


def duration_value(rng, unit):
    """Return (spoken, integer number of that unit), unit being 'seconds', 'minutes' or 'hours'."""
    in_unit = {"seconds": 1, "minutes": 60, "hours": 3600}[unit]
    smaller, larger = {"seconds": ("second", "minute"), "minutes": ("minute", "hour"), "hours": ("hour", "day")}[unit]
    step = 24 if unit == "hours" else 60
    style, n = rng.random(), rng.choice([rng.randint(1, 12), 5 * rng.randint(1, 12), rng.randint(1, 90)])
    count = number_in_words(n, rng) if rng.random() < 0.5 else str(n)
    few = rng.randint(1, 4)
    few_said = rng.choice([ONES[few], str(few)])
    if style < 0.5:
        short = {"seconds": ["sec", "secs", "s"], "minutes": ["min", "mins", " m"], "hours": ["hrs", "h", "hr"]}[unit]
        return rng.choice([f"{count} {smaller}s", f"{count} {smaller}s", f"{n} {rng.choice(short)}", f"{count}-{smaller}"]), n
    if style < 0.62:
        return rng.choice([(f"half an {larger}", step // 2), (f"half a {larger}", step // 2), (f"a quarter of an {larger}", step // 4),
                           (f"an {larger}", step), (f"a {larger}", step), (f"three quarters of an {larger}", step * 3 // 4)])
    if style < 0.75:
        return f"{few_said} {larger}{'s' if few > 1 else ''}", few * step
    if style < 0.9:
        return rng.choice([f"{few_said} and a half {larger}s", f"an {larger} and a half" if few == 1 else f"{few}.5 {larger}s"]), few * step + step // 2
    more = rng.choice([5, 10, 15, 20, 30, 40, 45]) if step == 60 else rng.randint(1, 23)
    return f"{few_said} {larger}{'s' if few > 1 else ''}{rng.choice([' and ', ' '])}{more} {smaller}s", few * step + more


def phrase_value(rng, low=1, high=4):
    """Return (spoken, the same text): a name, a title, a thing."""
    words = [any_word(rng) for _ in range(rng.randint(low, high))]
    if len(words) > 1 and rng.random() < 0.2:
        words.insert(rng.randrange(1, len(words)), rng.choice(["of", "the", "and", "for", "to", "my", "in", "de"]))
    text, style = " ".join(words), rng.random()
    if style < 0.2:
        text = text.title()
    elif style < 0.3:
        text = text.capitalize()
    elif style < 0.35:
        text = words[0] + "'s " + " ".join(words[1:]) if len(words) > 1 else text
    elif style < 0.45:
        number = rng.randint(1, 99)
        text = rng.choice([f"{text} {number}", f"{number} {text}"])
    return text, text


def text_value(rng):
    """Return (spoken, the same text): a longer message, copied word by word."""
    words = sentence(rng, 3, 10).split()
    if rng.random() < 0.25:
        words[rng.randrange(len(words) - 1)] += ","
    if rng.random() < 0.2:
        words.insert(rng.randrange(len(words)), rng.choice(["I'm", "don't", "it's", "we'll", "can't", "that's", "i", "I"]))
    if rng.random() < 0.15:
        words.insert(rng.randrange(len(words)), rng.choice([str(rng.randint(0, 30)), clock_value(rng)[0]]))
    text = " ".join(words)
    return text, text


def code_value(rng):
    """Return (spoken, the same text): an identifier, a number as text, an address."""
    word, digits = made_up_word(rng), "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 7)))
    text = rng.choice([f"{word.upper()[:3]}{digits}", f"{word[:2]}-{digits}", digits, f"{word}@{made_up_word(rng)}.{word[:3]}",
                       f"+{digits}", f"{word}_{digits}", f"20{rng.randint(10, 60)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"])
    return text, text


def day_value(rng):
    """Return (spoken, the same text): a day as people name it."""
    day = rng.choice("monday tuesday wednesday thursday friday saturday sunday".split())
    day = day.title() if rng.random() < 0.4 else day
    text = rng.choice(["today", "tomorrow", "tonight", "yesterday", day, day, f"next {day}", f"this {day}", "next week", "the day after tomorrow",
                       f"in {rng.randint(2, 20)} days", f"the {rng.randint(4, 20)}th", f"{rng.choice(['March', 'may', 'June', 'october'])} {rng.randint(1, 31)}"])
    return text, text


def say_list(items, rng):
    """Return the items as people enumerate them."""
    if len(items) == 1:
        return items[0]
    last = rng.choice([" and ", " and ", ", and ", " plus ", ", ", " & "])
    return rng.choice([", ", ", ", ", ", " and "]).join(items[:-1]) + last + items[-1]


def say_option(option, rng):
    """Return one of an enum's options the way a person says it."""
    spoken, style = option.replace("_", rng.choice([" ", " ", "-"])), rng.random()
    if option in RELATIVES and rng.random() < 0.25:
        return rng.choice(RELATIVES[option])
    if not option.islower() and rng.random() < 0.5:
        spoken = spoken.lower()
    return misspell(spoken, rng) if style < 0.08 else spoken.title() if style < 0.12 else option if style < 0.2 else spoken


# ── 4. Tools ─────────────────────────────────────────────────────────────────────────────────────────────────────

KINDS = dict(phrase=22, text=9, integer=12, decimal=6, duration=6, clock=10, day=5, enum=13, boolean=9, list=6, options=2, code=4, object=5)
STRINGS = ("phrase", "text", "code", "day", "list")       # kinds that look alike in a request
NUMBERS = ("integer", "decimal", "duration")


def join_name(words, rng):
    """Return the words as one identifier."""
    style = rng.random()
    if style < 0.85:
        return "_".join(words)
    return words[0] + "".join(w.title() for w in words[1:]) if style < 0.95 else rng.choice("-.").join(words)


def make_options(rng):
    """Return two to seven different options of an enum, written in one way."""
    style, separator = rng.choice([str, str, str, str, str.upper, str.title]), rng.choice("__ -")
    options = []
    for _ in range(rng.randint(2, 7)):
        words = [any_word(rng) for _ in range(rng.choice([1, 1, 1, 1, 2]))]
        option = style(words[0][:3]) if style is str.upper else style(separator.join(words))
        if not any(family(option) & family(old) for old in options):
            options.append(option)
    return options


def make_parameter(kind, taken, depth, rng):
    """Return a parameter: its name, kind, JSON Schema and the cue words a request may use for it."""
    while True:
        words = [any_word(rng) for _ in range(rng.choice([1, 1, 1, 2, 2, 3]))]
        if rng.random() < 0.06:     # such as "from" or "to"
            words[0] = rng.choice(GLUE_WORDS)
        if not taken & set(words) and len(set(words)) == len(words):
            break
    cues = list(words) if rng.random() < 0.8 else [" ".join(words)]
    parameter = dict(name=join_name(words, rng), kind=kind, cues=cues, options=[], fields=[], unit=None)
    types = dict(integer="integer", decimal="number", duration="integer", boolean="boolean", list="array", options="array", object="object")
    schema = {"type": types.get(kind, "string")}
    notes = sentence(rng, 1, 7)
    described = rng.random() < 0.7 or kind in ("duration", "clock")
    if described and rng.random() < 0.7:        # some cue words stand in the description only
        extra = any_word(rng)
        if extra not in taken:
            cues.append(extra)
            notes = f"{notes} {extra} {sentence(rng, 0, 3)}".strip()
    if kind == "duration":
        parameter["unit"] = rng.choice(["seconds", "minutes", "minutes", "minutes", "hours"])
        notes += rng.choice([" in {}", " ({})", ", {}"]).format(parameter["unit"])
    if kind == "clock":
        notes += rng.choice([" as HH:MM", " (HH:MM)", ", 24-hour HH:MM", " in the form HH:MM", " HH:MM, 24h"])
    if described:
        schema["description"] = notes[0].upper() + notes[1:] + rng.choice(["", ".", ""])
    if kind in ("enum", "options"):
        parameter["options"] = make_options(rng)
    if kind == "enum":
        schema["enum"] = parameter["options"]
    if kind == "options":
        schema["items"] = {"type": "string", "enum": parameter["options"]}
    if kind == "list":
        schema["items"] = {"type": "string"}
    if kind in NUMBERS and rng.random() < 0.3:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = rng.choice([0, 1])
    if kind in NUMBERS and rng.random() < 0.2:
        schema["maximum"] = rng.choice([rng.randint(2, 99), 100, 1000, 10000])
    if kind == "object":
        parameter["fields"] = make_parameters(rng.randint(1, 3), taken | set(words), depth + 1, rng)
        schema.update(object_schema(parameter["fields"]))
    for word in words + parameter["cues"]:
        taken |= family(word)
    parameter["schema"] = schema
    return parameter


def make_parameters(count, taken, depth, rng, shared=()):
    """Return count parameters whose words differ; the first is likelier to be required, some come from other tools."""
    parameters = []
    for i in range(count):
        if shared and rng.random() < 0.25:
            parameter = dict(rng.choice(shared), required=rng.random() < 0.6)
            if not taken & set(parameter["cues"] + [parameter["name"]]):
                taken.update(*map(family, parameter["cues"]))
                parameters.append(parameter)
                continue
        kind = rng.choices(list(KINDS), KINDS.values())[0]
        if kind == "object" and depth:
            kind = "phrase"
        parameter = make_parameter(kind, taken, depth, rng)
        parameter["required"] = rng.random() < (0.75 if i == 0 else 0.4)
        parameters.append(parameter)
    return parameters


def object_schema(parameters):
    """Return the JSON Schema of an object with these parameters."""
    schema = {"type": "object", "properties": {p["name"]: p["schema"] for p in parameters}}
    required = [p["name"] for p in parameters if p["required"]]
    if required:
        schema["required"] = required
    return schema


def make_tool(shared, known_parameters, rng):
    """Return a tool: its name, definition, parameters and cue words; it shares some words and parameters with others."""
    while True:
        words = [any_word(rng) for _ in range(rng.choice([1, 2, 2, 2, 3]))]
        if rng.random() < 0.3 and shared:
            words[rng.randrange(len(words))] = rng.choice(shared)
        # One made-up word in every name: so no name can be the name of a real tool.
        if any(w not in PLAIN_WORDS for w in words):
            break
    shared.extend(words)
    name, cues = join_name(words, rng), list(words)
    description = ""
    if rng.random() < 0.95:
        parts = [sentence(rng, 1, 5) for _ in range(rng.randint(1, 3))]
        extra = [any_word(rng) for _ in range(rng.randint(0, 2))]
        for word in extra:
            parts.insert(rng.randrange(len(parts) + 1), word)
        cues += extra
        description = " ".join(parts)
        description = description[0].upper() + description[1:] + rng.choice([".", ".", ""])
    parameters = make_parameters(rng.choice([0, 1, 1, 2, 2, 3, 3, 4, 5]), set(words), 0, rng, known_parameters)
    known_parameters.extend(p for p in parameters if p["kind"] != "object")
    schema = object_schema(parameters)
    function = {"name": name, "description": description, "parameters": schema} if description else {"name": name, "parameters": schema}
    return dict(name=name, words=words, cues=cues, parameters=parameters, definition={"type": "function", "function": function})


def rename(tool, rng):
    """Return the tool with its name's words joined anew, so that even a known tool's name must be read."""
    name = join_name(tool["words"], rng)
    function = dict(tool["definition"]["function"], name=name)
    return dict(tool, name=name, definition={"type": "function", "function": function})


def make_template(tool, rng):
    """Return a fixed phrasing for this tool: a list of words and of (object's name or None, parameter, fixed value or None)."""
    slots = []
    for p in tool["parameters"]:
        if p["required"] or rng.random() < 0.45:
            fields = [q for q in p["fields"] if q["required"] or rng.random() < 0.6] or p["fields"][:1]
            slots += [(p["name"], q, None) for q in fields] or [(None, p, None)]
    rng.shuffle(slots)
    slots.sort(key=lambda slot: slot[1]["kind"] == "text" and rng.random() < 0.8)

    def words(low, high):
        return [glue_word(rng) if rng.random() < 0.45 else any_word(rng) for _ in range(rng.randint(low, high))]

    template = words(0, 2) if slots else words(2, 4)
    for owner, parameter, _ in slots:
        template += words(1, 3)
        # A yes or no is in the words themselves.
        template.append((owner, parameter, rng.random() < 0.6 if parameter["kind"] == "boolean" else None))
    return template + (words(0, 2) if not slots or slots[-1][1]["kind"] != "text" else [])


def flat_parameters(parameters):
    """Return the parameters with objects replaced by their fields."""
    return [q for p in parameters for q in (p["fields"] or [p])]


def make_known_tools(count=300, templates=12):
    """Return tools that stay the same throughout the training, each with phrasings that share no word with its definition.

    Random tools are called by words that stand in their definition. These teach the other half: to know by heart which
    phrasing means which tool, and which word means which option, as fine-tuning will have to.
    """
    rng, tools = random.Random("known tools"), []
    while len(tools) < count:
        tool = make_tool([], [], rng)
        for p in flat_parameters(tool["parameters"]):
            p["aliases"] = {option: [any_word(rng), f"{glue_word(rng)} {any_word(rng)}"] for option in p["options"] or (False, True)}
        tools.append(dict(tool, templates=[make_template(tool, rng) for _ in range(templates)]))
    return tools


KNOWN_TOOLS = make_known_tools()


def make_tools(rng):
    """Return one to twelve tools with different names, some of them known."""
    shared, known_parameters, tools = [], [], {}
    known = rng.choice([0, 0, 0.3, 0.6, 0.9])
    for _ in range(rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 9, 10, 10, 11, 12])):
        tool = rename(rng.choice(KNOWN_TOOLS), rng) if rng.random() < known else make_tool(shared, known_parameters, rng)
        tools[tool["name"]] = tool
    return list(tools.values())


# ── 5. Requests and answers ──────────────────────────────────────────────────────────────────────────────────────

def make_value(parameter, rng):
    """Return (spoken, value) for a parameter that is not an object."""
    kind = parameter["kind"]
    if kind == "enum":
        option = rng.choice(parameter["options"])
        if "aliases" in parameter and rng.random() < 0.4:
            return rng.choice(parameter["aliases"][option]), option
        return say_option(option, rng), option
    if kind == "options":
        chosen = rng.sample(parameter["options"], rng.randint(1, min(3, len(parameter["options"]))))
        return say_list([say_option(o, rng) for o in chosen], rng), chosen
    if kind == "list":
        items = [phrase_value(rng, 1, 2)[0] for _ in range(rng.choice([1, 2, 2, 3, 3, 4, 5]))]
        return say_list(items, rng), items
    if kind == "duration":
        return duration_value(rng, parameter["unit"])
    makers = dict(phrase=phrase_value, text=text_value, code=code_value, day=day_value, integer=integer_value, decimal=decimal_value, clock=clock_value)
    return makers[kind](rng)


def can_stand_bare(parameter, siblings):
    """Say whether a value of this parameter is recognised without a cue word: it is the only one of its look."""
    kind = parameter["kind"]
    if kind in ("boolean", "object", "options"):
        return False
    look = STRINGS if kind in STRINGS else NUMBERS if kind in NUMBERS else (kind,)
    return kind == "enum" or sum(p["kind"] in look for p in siblings) == 1


def mention(parameter, siblings, noise, rng, spoken_value=None):
    """Return (text, value): how a request gives this parameter, and its value in the call; a value may be given."""
    cue = say_word(rng.choice(parameter["cues"]), noise, rng)
    if parameter["kind"] == "boolean":
        value = rng.random() < 0.6
        return rng.choice(TRUE_MENTIONS if value else FALSE_MENTIONS).format(c=cue), value
    if parameter["kind"] == "object":
        chosen = [p for p in parameter["fields"] if p["required"] or rng.random() < 0.6] or parameter["fields"][:1]
        said = [mention(p, siblings, noise, rng) for p in chosen]
        text = rng.choice([" ", ", ", " and "]).join(text for text, _ in said)
        return (f"{cue} {text}" if rng.random() < 0.5 else text), {p["name"]: value for p, (_, value) in zip(chosen, said)}
    spoken, value = spoken_value or make_value(parameter, rng)
    if parameter["kind"] in ("text", "phrase") and rng.random() < 0.12:
        spoken = rng.choice(["'{}'", '"{}"', "“{}”"]).format(spoken)
    bare = can_stand_bare(parameter, siblings) and rng.random() < 0.55
    if parameter["kind"] in STRINGS:
        pattern = rng.choice(LONG_BARE if bare else LONG_NAMED)
    else:
        pattern = rng.choice(SHORT_BARE if bare else SHORT_NAMED)
    return pattern.replace("{g}", rng.choice(GLUE_WORDS)).replace("{c}", cue).replace("{s}", spoken), value


def name_the_action(tool, tools, noise, rng):
    """Return words that point to this tool and to no other."""
    elsewhere = {w for t in tools if t is not tool for cue in t["cues"] for w in family(cue)}
    own = [w for w in tool["cues"] if w not in elsewhere] or tool["words"]
    if rng.random() < 0.35:
        words = list(tool["words"]) if rng.random() < 0.8 else tool["words"][::-1]
        if not set(words) & set(own):
            words.append(rng.choice(own))
    else:
        words = rng.sample(own, rng.randint(1, min(2, len(own))))
    words = [say_word(w, noise, rng) for w in words]
    if rng.random() < 0.4:
        words.insert(rng.randrange(len(words) + 1), glue_word(rng))
    return " ".join(words)


def say_template(tool, noise, rng):
    """Return (text, [call]): a request in one of the tool's fixed phrasings, and the call that answers it."""
    words, arguments = [], {}
    for piece in rng.choice(tool["templates"]):
        if isinstance(piece, str):
            words.append(misspell(piece, rng) if rng.random() < noise else piece)
            continue
        owner, parameter, value = piece
        if value is None:
            spoken, value = make_value(parameter, rng)
            words.append(spoken)
        else:
            words.append(rng.choice(parameter["aliases"][value]))
        (arguments.setdefault(owner, {}) if owner else arguments)[parameter["name"]] = value
    arranged = {}       # in the order of the tool's definition
    for p in tool["parameters"]:
        if p["name"] in arguments:
            value = arguments[p["name"]]
            arranged[p["name"]] = {q["name"]: value[q["name"]] for q in p["fields"] if q["name"] in value} if p["fields"] else value
    return " ".join(words), [{"name": tool["name"], "arguments": arranged}]


def say_calls(tool, tools, noise, copies, rng, omit=None):
    """Return (text, calls): a request for this tool and the calls that answer it, copies of them if one value can vary."""
    if "templates" in tool and copies == 1 and omit is None and rng.random() < 0.7:
        return say_template(tool, noise, rng)
    parameters = tool["parameters"]
    chosen = [p for p in parameters if p is not omit and (p["required"] or rng.random() < 0.5)]
    siblings = flat_parameters(parameters)
    varied = [p for p in chosen if p["kind"] in ("phrase", "enum", "code", "integer", "clock", "day", "duration")] if copies > 1 else []
    varied, values, spoken_value = rng.choice(varied) if varied else None, [None], None
    if varied:      # "a and b" for a parameter that takes one value: one call for a, another for b
        spoken, values = zip(*[make_value(varied, rng) for _ in range(copies)])
        spoken_value = say_list(list(spoken), rng), None
    said = [mention(p, siblings, noise, rng, spoken_value if p is varied else None) for p in chosen]
    calls = [
        {"name": tool["name"], "arguments": {p["name"]: one if p is varied else value for p, (_, value) in zip(chosen, said)}}
        for one in values
    ]
    # A long text reads to the end of the request, as a person would put it; the rest comes in any order.
    texts = [text for p, (text, _) in zip(chosen, said) if p["kind"] != "text"]
    rng.shuffle(texts)
    tails = [text for p, (text, _) in zip(chosen, said) if p["kind"] == "text"]
    texts = texts + tails if rng.random() < 0.9 else tails + texts
    action = name_the_action(tool, tools, noise, rng)
    joiner = rng.choice([" ", " ", " ", ", ", " and "])
    if texts and " " in action and rng.random() < 0.15:     # or amid its words
        first, rest = action.split(" ", 1)
        action = f"{first} {texts.pop(0)} {rest}"
    elif texts and rng.random() < 0.2:      # the values may come before the action
        action = texts.pop(0) + rng.choice([" ", ", ", " - "]) + action
    elif rng.random() < 0.6:
        action = f"{rng.choice(OPENERS)} {action}".strip()
    if rng.random() < 0.05:                 # words that mean nothing to any tool
        texts.insert(rng.randrange(len(texts) + 1), sentence(rng, 1, 3))
    return joiner.join([action] + texts) if rng.random() < 0.5 else " ".join([action] + texts), calls


def write_calls(calls):
    """Return the assistant's text for these calls, exactly as the chat template writes it."""
    return "\n".join(
        '<tool_call>\n{"name": "' + call["name"] + '", "arguments": ' + json.dumps(call["arguments"], ensure_ascii=False) + "}\n</tool_call>"
        for call in calls
    )


def make_request(tools, rng):
    """Return (request, answer): one, two or three calls, or a reply in plain words."""
    noise, style = rng.choice([0, 0, 0, 0.03, 0.12]), rng.random()
    if style < 0.1:
        words = dict(a=any_word(rng), b=any_word(rng), c=any_word(rng))
        tool = rng.choice(tools)
        required = [p for p in tool["parameters"] if p["required"]]
        if required and rng.random() < 0.25:        # a request that leaves out what the tool needs
            missing = rng.choice(required)
            request, _ = say_calls(tool, tools, noise, 1, rng, omit=missing)
            return dress(request, noise, rng), rng.choice(QUESTIONS).format(a=" ".join(re.findall("[a-zA-Z][^_.-]*", missing["name"])))
        if rng.random() < 0.45:     # a request for a tool that is not on the list
            request, _ = say_calls(make_tool([], [], rng), [], noise, 1, rng)
        else:
            request = rng.choice(CHATTER).format(**words)
        words["a"] = rng.choice([w for w in request.split() if w.isalpha()] or ["that"])
        answer = rng.choice(REPLIES).format(**words)
    else:
        count = 1 if style < 0.87 else 2 if style < 0.97 else 3
        if count > 1 and rng.random() < 0.3:
            said = [say_calls(rng.choice(tools), tools, noise, count, rng)]
        else:
            said = [say_calls(tool, tools, noise, 1, rng) for tool in rng.choices(tools, k=count)]
        request, answer = rng.choice(JOINERS).join(text for text, _ in said), write_calls([call for _, calls in said for call in calls])
    return dress(request, noise, rng), answer


def dress(request, noise, rng):
    """Return the request with the small habits of typing around it: fillers, a capital, an end mark, misspelled glue."""
    if noise:
        request = " ".join(misspell(w, rng) if w in GLUE_WORDS and rng.random() < noise else w for w in request.split(" "))
    if rng.random() < 0.1:
        request = rng.choice(LEADS).format(a=any_word(rng), b=any_word(rng)) + rng.choice([", ", " so ", ". ", " - "]) + request
    if rng.random() < 0.2:
        request = rng.choice(FILLERS) + rng.choice([" ", ", ", "... "]) + request
    request += rng.choice(CLOSERS) if rng.random() < 0.5 else ""
    style = rng.random()
    if style < 0.4:
        request = request[0].upper() + request[1:]
    return request + rng.choice(["", "", "", ".", ".", "?", "!", " 🙂", "..", "!!"])


def render_prompt(tools, rng):
    """Return the text before the user's words, exactly as the chat template writes it."""
    system = ""
    if rng.random() < 0.15:
        system = rng.choice(SYSTEM_TEXTS).format(a=any_word(rng), b=any_word(rng)) + "\n\n"
    lines = "\n".join(json.dumps(tool["definition"], ensure_ascii=False) for tool in tools)
    return (
        f"<|im_start|>system\n{system}# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{lines}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n<|im_start|>user\n'
    )


BEFORE_ANSWER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
AFTER_ANSWER = "<|im_end|>"


def make_group(rng):
    """Return (prompt, [(request, answer), ...]): one list of tools and several requests about it."""
    tools = make_tools(rng)
    return render_prompt(tools, rng), [make_request(tools, rng) for _ in range(rng.randint(7, 14))]


# ── 6. Tokenizer ─────────────────────────────────────────────────────────────────────────────────────────────────

def train_tokenizer(seed, groups):
    """Return a byte-level BPE tokenizer, trained on groups of generated conversations."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    def texts():
        for i in range(groups):
            prompt, requests = make_group(random.Random(f"{seed} tokenizer {i}"))
            for text in [prompt] + [text for pair in requests for text in pair]:
                yield from re.split(r"<\|im_start\|>|<\|im_end\|>|</?tool_call>", text)

    tokenizer = Tokenizer(models.BPE())
    # A run of letters, one digit, or a run of anything else. A space is never part of a word, so a word has the same
    # tokens in a sentence, after a quote and inside a name: copying it is copying tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\p{L}\p{N}]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(CONTROL_TOKENS), show_progress=False, max_token_length=16,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=special) for text, special in CONTROL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer, template, folder):
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into folder, and return the loaded tokenizer."""
    from transformers import PreTrainedTokenizerFast

    # The generic class: Qwen2Tokenizer would put Qwen's own pre-tokenizer in place of ours when it is loaded.
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=ROW_LENGTH,
        clean_up_tokenization_spaces=False, chat_template=template,
    )
    wrapped.save_pretrained(folder)
    return wrapped


def check_prompts(wrapped, seed):
    """Raise unless the text that the model is trained on is the text that the chat template serves."""
    for i in range(20):
        rng = random.Random(f"{seed} check {i}")
        tools = make_tools(rng)
        request, _ = make_request(tools, rng)
        prompt = render_prompt(tools, random.Random(2))     # this seed gives no system text
        served = wrapped.apply_chat_template(
            [{"role": "user", "content": request}], tools=[t["definition"] for t in tools],
            add_generation_prompt=True, enable_thinking=False, tokenize=False,
        )
        assert served == prompt + request + BEFORE_ANSWER, "the training prompt differs from the chat template's"
        call = {"name": tools[0]["name"], "arguments": {"é": [1.5, True, {"ß": "🙂"}]}}
        messages = [{"role": "user", "content": request},
                    {"role": "assistant", "tool_calls": [{"type": "function", "function": call}] * 2}]
        served = wrapped.apply_chat_template(messages, tools=[t["definition"] for t in tools], tokenize=False)
        assert served == prompt + request + BEFORE_ANSWER + write_calls([call] * 2) + AFTER_ANSWER + "\n"


# ── 7. Batches ───────────────────────────────────────────────────────────────────────────────────────────────────

def make_batch(tokenizer, seed, step, rows):
    """Return one step's tokens as 16-bit integers [5, rows, ROW_LENGTH]: ids, labels, positions, groups, parts.

    A row holds groups one after the other. In a group the prompt (part 0) comes once, and every request with its
    answer (parts 1, 2, ...) continues it on its own: it sees the prompt and itself, and its positions start after
    the prompt, as if the other requests were not there. Only answers have labels.
    """
    import torch

    rng = random.Random(f"{seed} step {step}")
    batch = torch.zeros(5, rows, ROW_LENGTH, dtype=torch.int16)
    ids, labels, positions, groups, parts = batch
    ids.fill_(tokenizer.token_to_id("<|endoftext|>"))
    labels.fill_(IGNORED)
    for row in range(rows):
        used, group, misses = 0, 0, 0
        while used < ROW_LENGTH - 350 and misses < 4:
            prompt, requests = make_group(rng)
            encoded = [e.ids for e in tokenizer.encode_batch_fast([prompt] + [t for r, a in requests for t in (r + BEFORE_ANSWER, a + AFTER_ANSWER)])]
            length = len(encoded[0])
            if used + length + 200 > ROW_LENGTH:        # too long for the rest of the row: try another
                misses += used > 0
                continue
            group += 1
            pieces = [(encoded[0], [], 0)] + [(encoded[i], encoded[i + 1], (i + 1) // 2) for i in range(1, len(encoded), 2)]
            for question, answer, part in pieces:
                start, middle, end = used, used + len(question), used + len(question) + len(answer)
                if end > ROW_LENGTH:
                    continue
                ids[row, start:end] = torch.tensor(question + answer)
                # The label of a token is the token after it, so labels stand one place earlier.
                if answer:
                    labels[row, middle - 1:end - 1] = torch.tensor(answer)
                first = length if part else 0
                positions[row, start:end] = torch.arange(first, first + end - start)
                groups[row, start:end], parts[row, start:end] = group, part
                used = end
    return batch


class Batches:
    """The steps' batches as a map-style dataset, so that a DataLoader's workers make them in parallel, in a fixed order."""

    def __init__(self, tokenizer_file, seed, steps, rows):
        self.tokenizer_file, self.seed, self.steps, self.rows = str(tokenizer_file), seed, steps, rows
        self.tokenizer = None

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        if self.tokenizer is None:
            from tokenizers import Tokenizer
            self.tokenizer = Tokenizer.from_file(self.tokenizer_file)
        return make_batch(self.tokenizer, self.seed, step, self.rows)


def make_mask(groups, parts, attention):
    """Return the attention mask: a token sees earlier tokens of its own part and of its group's prompt."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(row, head, query, key):
        same_group = groups[row, query] == groups[row, key]
        return (query >= key) & same_group & ((parts[row, key] == 0) | (parts[row, query] == parts[row, key]))

    rows, length = groups.shape
    if attention == "flex_attention":
        return create_block_mask(allowed, rows, None, length, length, device=groups.device)
    index = torch.arange(length, device=groups.device)
    return allowed(torch.arange(rows, device=groups.device)[:, None, None], None, index[:, None], index[None, :])[:, None]


# ── 8. Training ──────────────────────────────────────────────────────────────────────────────────────────────────

def make_model(tokenizer, attention):
    """Return a Qwen3 with random weights that fits the tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE, max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=end, pad_token_id=pad, attn_implementation=attention, **MODEL_SHAPE,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.update(bos_token_id=None, eos_token_id=[end, pad], pad_token_id=pad, do_sample=False)
    return model


def learning_rate(done):
    """Return the share of the peak learning rate after this share of the training: a cosine down to zero."""
    return 0.5 * (1 + math.cos(math.pi * min(1, done)))


def orthogonalize(matrices):
    """Return about the nearest orthogonal matrix to each matrix, by Muon's five Newton-Schulz steps."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Muon:
    """The Muon optimizer for matrices: momentum, made orthogonal, so that every direction of a matrix learns equally fast.

    Here it needs a quarter of the steps that AdamW needs for the same loss. Matrices of one shape are updated together.
    """

    def __init__(self, matrices):
        self.groups, self.averages = {}, {}
        for matrix in matrices:
            self.groups.setdefault(matrix.shape, []).append(matrix)

    def step(self, rate):
        """Update all matrices from their gradients."""
        import torch

        for shape, group in self.groups.items():
            gradient = torch.stack([matrix.grad for matrix in group])
            average = self.averages.setdefault(shape, torch.zeros_like(gradient)).lerp_(gradient, 1 - MUON_MOMENTUM)
            update = orthogonalize(gradient.lerp(average, MUON_MOMENTUM).bfloat16()).float()
            # An orthogonal update has small entries: this factor gives it the size of a usual AdamW update.
            update *= 0.2 * max(shape) ** 0.5
            with torch.no_grad():
                torch._foreach_mul_(group, 1 - rate * WEIGHT_DECAY)
                torch._foreach_add_(group, list(update.unbind()), alpha=-rate)


def train(model, loader, steps, minutes, device, attention):
    """Train the model in place on the loader's batches, for that many steps or minutes, whichever ends first."""
    import torch
    import torch.nn.functional as F

    # The forward pass runs in the 16 bits that are saved; the optimizer keeps 32-bit copies, or small updates would be lost.
    model.to(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    weights = [p for p in model.parameters()]
    masters = [p.detach().float().clone() for p in weights]
    matrices = [m for m in masters if m.dim() == 2 and m.shape[0] != VOCABULARY_SIZE]
    muon = Muon(matrices)
    rest = [m for m in masters if not any(m is matrix for matrix in matrices)]      # the embeddings and the norms
    adamw = torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=device == "cuda")
    body = torch.compile(model.model, dynamic=False) if device == "cuda" else model.model
    model.train()
    began, losses = time.time(), []
    for step, batch in enumerate(loader):
        elapsed = (time.time() - began) / 60
        done = max(step / steps, elapsed / minutes)
        if done >= 1:
            break
        ids, labels, positions, groups, parts = batch.to(device, non_blocking=True).long()
        mask = make_mask(groups, parts, attention)
        hidden = body(input_ids=ids, position_ids=positions, attention_mask={"full_attention": mask}, use_cache=False).last_hidden_state
        trained = labels != IGNORED
        loss = F.cross_entropy(model.lm_head(hidden[trained]).float(), labels[trained])
        loss.backward()
        rate = LEARNING_RATE * min(1, (step + 1) / WARMUP_STEPS) * learning_rate(done)
        adamw.param_groups[0]["lr"] = rate
        for master, weight in zip(masters, weights):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, MAX_GRAD_NORM)
        adamw.step()
        muon.step(rate)
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        losses.append(loss.detach())
        if step % 100 == 99 or step < 3:
            mean = torch.stack(losses[-100:]).mean().item()
            print(f"step {step + 1:5} of {steps}  loss {mean:.4f}  {time.time() - began:6.1f} s", flush=True)
    print(f"trained {len(losses)} steps in {time.time() - began:.0f} s", flush=True)


def main():
    """Train the tokenizer and the model, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny-qwen3", help="folder to write")
    parser.add_argument("--steps", type=int, default=10200, help="optimizer steps")
    parser.add_argument("--minutes", type=float, default=15, help="stop after this time; the learning rate reaches zero then")
    parser.add_argument("--rows", type=int, default=32, help=f"rows of {ROW_LENGTH} tokens in one step")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes that make batches")
    parser.add_argument("--attention", choices=["flex_attention", "sdpa"], help="flex_attention on a GPU, else sdpa")
    parser.add_argument("--seed", type=int, default=3407, help="seed of the conversations and the first weights")
    arguments = parser.parse_args()

    os.environ["TOKENIZERS_PARALLELISM"] = "false"      # the workers are the parallelism
    import torch

    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = arguments.attention or ("flex_attention" if device == "cuda" else "sdpa")

    began = time.time()
    tokenizer = train_tokenizer(arguments.seed, TOKENIZER_GROUPS)
    template = (Path(__file__).parent.parent / "tool_calling/templates/qwen3.jinja").read_text(encoding="utf-8")
    check_prompts(save_tokenizer(tokenizer, template, arguments.output), arguments.seed)
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens, {time.time() - began:.0f} s", flush=True)

    model = make_model(tokenizer, attention)
    print(f"model: {model.num_parameters():,} parameters, {attention}, {device}", flush=True)
    batches = Batches(arguments.output / "tokenizer.json", arguments.seed, arguments.steps, arguments.rows)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, num_workers=arguments.workers, prefetch_factor=8, pin_memory=device == "cuda",
    )
    train(model, loader, arguments.steps, arguments.minutes, device, attention)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    print(f"saved {arguments.output}")


if __name__ == "__main__":
    main()
