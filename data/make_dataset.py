"""Write the synthetic tool-calling dataset: one row per line, the same bytes for the same seed.

    python data/make_dataset.py                          # writes data/synthetic_finetune_dataset.json
    python data/make_dataset.py --rows 5000 --output my_rows.json

To make such a dataset for your own tools:
  1. describe the tools in tools.json;
  2. write one slot function per kind of value: it returns the spoken words and the arguments they mean;
  3. write thirty or more phrasings a tool in PHRASES, with {slots} where the values go;
  4. add requests that must not call a tool (NO_CALL) and requests for several calls (MIXED, PAIRS).

Two rules keep the rows honest, and so learnable: every argument comes from words in the request, and an
optional argument is given exactly when the request states it.
"""

import argparse
import json
import random
import re
from pathlib import Path

# --- 0 settings -----------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
SEED = 3407
ROWS = 2000
NO_CALL_SHARE = 0.08  # answered in words: without these a model learns to call a tool at any price
PARALLEL_SHARE = 0.08  # answered with two or three calls
SINGLE_WORDS = (4, 30)  # fewest and most words in a request for one call
PARALLEL_WORDS = (6, 45)

# --- 1 words: long lists, combined where possible, so that held-out rows hold values unseen in training -------


def items_of(text):
    """The comma-separated items of `text`; an item may run over the end of a line."""
    return [" ".join(item.split()) for item in text.split(",")]

FIRST_NAMES = """Ada Aisha Alan Alice Amir Ana Andre Anika Anton Asha Ava Bella Ben Bianca Bruno Carla Carlos Cathy
Chen Chloe Clara Cleo Cora Dana Daniel David Diego Dina Dora Eddie Elena Eli Ella Emil Emma Erik Esther Eva Farah
Felix Fiona Frank Gabi George Gina Greta Hana Hannah Hassan Hugo Ian Ida Ines Iris Isaac Ivan Jack Jamal James Jane
Jasper Jenny Joel Jonas Julia Kai Karim Kate Kenji Lara Laura Lena Leo Liam Lila Linda Lucas Lucy Marco Maria Marta
Max Maya Mia Milo Mona Nadia Nina Noah Nora Olga Oliver Omar Oscar Paula Pedro Petra Priya Rafael Raj Rita Rosa Ruth
Sam Sara Simon Stella Tara Theo Tina Tom Uma Vera Victor Wei Yara Yuki Zoe""".split()
LAST_NAMES = """Adams Ahmed Ali Baker Bauer Becker Bell Brown Campbell Carter Castro Chang Clark Cohen Cooper Costa
Cruz Davis Diaz Dixon Evans Fischer Flores Ford Foster Garcia Gomez Gray Gupta Hall Harris Hayes Hill Holm Hughes
Ito Jackson Jensen Jones Kaya Kelly Khan Kim Klein Kumar Lang Larsen Lee Lewis Lopez Marsh Martin Meyer Miller Moore
Morgan Murphy Nair Nash Novak Olsen Ortiz Park Patel Perez Quinn Reed Rossi Russell Sato Schmidt Scott Shah Silva
Singh Smith Stone Suzuki Tanaka Taylor Torres Turner Vega Wagner Walker Watson Weber Wilson Wong Young""".split()
CITIES = items_of("""Accra, Adelaide, Amsterdam, Athens, Atlanta, Auckland, Austin, Baltimore, Bangkok, Barcelona,
Basel, Beirut, Belfast, Berlin, Bogota, Bologna, Boston, Bremen, Brisbane, Bristol, Brussels, Budapest, Cairo,
Calgary, Cape Town, Cardiff, Casablanca, Chicago, Cleveland, Cologne, Copenhagen, Dakar, Dallas, Delhi, Denver,
Detroit, Dubai, Dublin, Edinburgh, Florence, Frankfurt, Geneva, Genoa, Glasgow, Hamburg, Hanoi, Havana, Helsinki,
Hong Kong, Houston, Istanbul, Jakarta, Jerusalem, Johannesburg, Kansas City, Karachi, Kingston, Krakow, Kyoto,
Lagos, Lahore, Las Vegas, Leeds, Leipzig, Lima, Lisbon, Liverpool, London, Los Angeles, Lyon, Madrid, Malaga,
Manchester, Manila, Marseille, Melbourne, Memphis, Mexico City, Miami, Milan, Minneapolis, Montreal, Moscow, Mumbai,
Munich, Nairobi, Naples, Nashville, New Orleans, New York, Oakland, Orlando, Osaka, Oslo, Ottawa, Oxford, Palermo,
Paris, Perth, Philadelphia, Phoenix, Pisa, Pittsburgh, Portland, Porto, Prague, Quebec, Rome, Rotterdam, Salt Lake
City, Salzburg, San Diego, San Francisco, San Jose, Santiago, Seattle, Seoul, Seville, Shanghai, Singapore,
Stockholm, Stuttgart, Sydney, Taipei, Tampa, Tokyo, Toronto, Toulouse, Tunis, Turin, Valencia, Vancouver, Venice,
Verona, Vienna, Warsaw, Washington, Wellington, Zagreb, Zurich""")
STREETS = """Abbey Ash Bridge Castle Cedar Cherry Chestnut Church Elm Forest Garden Harbor High King Lake Lime Maple
Market Mill North Oak Orchard Park Pine Queen River Rose School
Spring Station Union Valley Walnut Water Willow""".split()
LANDMARKS = items_of("Station, Hospital, Mall, Museum, Theater, Hotel, Stadium, Library, School, Market, Airport, Cafe")

FOOD = items_of("""apples, bananas, bread, butter, carrots, cheese, chicken, coffee, corn, crackers, cucumbers,
eggs, fish, garlic, ginger, grapes, ham, honey, ketchup, lemons, lettuce, mangoes, milk, mushrooms, mustard,
noodles, nuts, oats, olives, onions, pasta, peaches, pears, peas, pepper, plums, potatoes, rice, salad, salmon,
salt, sausages, soup, spinach, sugar, tea, tofu, tomatoes, tuna, vinegar, yogurt""")
HOUSEHOLD = items_of("""soap, shampoo, toothpaste, sponges, candles, batteries, napkins, tissues, matches,
detergent, light bulbs, dish soap, paper towels, trash bags, cat food, dog food, toilet paper, baking powder, olive
oil, orange juice, peanut butter, almond milk, baking soda, ice cream, chocolate chips, hand cream, bin liners, oven
gloves""")

DISHES = items_of("""rice, pasta, soup, stew, chicken, beans, lentils, pizza, eggs, potatoes, noodles, curry, fish,
dumplings, meatballs, tofu, lasagna, chili, ravioli, sausages""")
DISH_KINDS = """leftover lemon tomato garlic spicy cheesy pumpkin ginger mushroom pepper onion basil coconut
homemade""".split()
CHORES = items_of("""laundry, nap, workout, homework, plank, meditation, face mask, piano practice, reading break,
stretching, board game, green tea, apple pie, lemon cake, banana bread, oat cookies, blueberry muffins, cold brew,
dough, oven""")
TOPICS = """budget marketing design school piano sales project team product garden writing hiring security travel
planning family software training wedding garage customer client board football film press charity museum
dance""".split()
EVENT_KINDS = "meeting review call workshop session visit demo talk chat briefing seminar appointment".split()

THINGS = items_of("""keys, umbrella, tickets, backpack, laptop, charger, jacket, glasses, passport, bike, suitcase,
camera, package, invoice, contract, report, slides, photos, guitar, ladder""")
THING_KINDS = "blue red black green gray yellow old new spare small".split()
SPOTS = items_of("""front desk, train station, library, bus stop, coffee shop, reception, gym, office, studio, bakery,
museum, school, harbor, car wash, swimming pool, theater, cinema, bike shop, playground, cafeteria""")

WEEKDAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
MONTHS = "january february march april may june july august september october november december".split()
NUMBER_WORDS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12,
    "fifteen": 15, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80,
    "ninety": 90,
}
CURRENCIES = "dollars euros pounds yen rupees francs".split()

# --- 2 slots: each draws a value and returns (the words said, the arguments they mean) ------------------------


def said(rng, value):
    """`value` as a person types it: in lower case every third time, and the argument copies what was typed."""
    return value.lower() if rng.random() < 0.33 else value


def clock(rng, hours, suffix=""):
    """Digits such as 6:45 or 7 with their (hour, minute)."""
    hour = rng.choice(hours)
    minute = rng.choice((0, 0, 0, *range(5, 60, 5)))
    return (f"{hour}:{minute:02d}" if minute or rng.random() < 0.3 else f"{hour}") + suffix, hour, minute


def slot_clock(rng):
    """A time in digits that is clear by itself: 6:45 am, 7pm or 18:30."""
    form = rng.choice(("am", "pm", "24h"))
    if form == "24h":
        hour, minute = rng.randint(13, 21), rng.randrange(0, 60, 5)
        return f"{hour}:{minute:02d}", {"time": f"{hour}:{minute:02d}"}
    suffix = rng.choice((" ", "")) + form
    words, hour, minute = clock(rng, range(6, 12) if form == "am" else range(1, 11), suffix)
    return words, {"time": f"{hour + 12 * (form == 'pm'):02d}:{minute:02d}"}


def slot_spoken_time(rng):
    """A time in words, with the part of the day that makes it clear."""
    if rng.random() < 0.15:
        return "noon", {"time": "12:00"}
    part, hours, shift = rng.choice((
        ("in the morning", range(5, 12), 0),
        ("in the afternoon", range(2, 6), 12),
        ("in the evening", range(6, 10), 12),
    ))
    hour = rng.choice(hours)
    word = {value: key for key, value in NUMBER_WORDS.items()}.get(hour, "eleven")
    lead, minutes = rng.choice((("", 0), ("half past ", 30), ("quarter past ", 15), ("quarter to ", -15)))
    total = (hour + shift) * 60 + minutes
    return f"{lead}{word} {part}", {"time": f"{total // 60:02d}:{total % 60:02d}"}


def slot_time(rng):
    return slot_clock(rng) if rng.random() < 0.7 else slot_spoken_time(rng)


def slot_morning(rng):
    """A time to wake up, which is in the morning even as a bare 6:45 or 7."""
    words, hour, minute = clock(rng, range(5, 11), rng.choice(("", "", " am", "am")))
    return words, {"time": f"{hour:02d}:{minute:02d}"}


def slot_day(rng):
    """A day from tomorrow on; "on" is a word of the request, not of the day."""
    form = rng.choice(("tomorrow", "weekday", "weekday", "next", "month", "month", "ordinal"))
    if form == "tomorrow":
        day = rng.choice(("tomorrow", "tomorrow", "tmrw"))
        return day, {"day": day}
    if form == "next":
        day = f"{rng.choice(('next', 'this'))} {said(rng, rng.choice(WEEKDAYS).title())}"
        return day, {"day": day}
    if form == "weekday":
        day = said(rng, rng.choice(WEEKDAYS).title())
    elif form == "month":
        day = said(rng, f"{rng.choice(MONTHS).title()} {rng.randint(1, 28)}")
    else:
        day = f"the {rng.randint(4, 20)}th"
    return f"on {day}", {"day": day}


def slot_when(rng):
    """A day of a forecast, today included."""
    day = rng.choice(("today", "tonight", "this weekend", None, None, None))
    return (day, {"day": day}) if day else slot_day(rng)


def slot_repeat(rng):
    words, repeat = rng.choice((
        ("every day", "daily"), ("daily", "daily"), ("on weekdays", "weekdays"), ("every weekday", "weekdays"),
        ("on weekends", "weekends"), ("every weekend", "weekends"),
    ))
    return words, {"repeat": repeat}


def slot_number(rng):
    """A number of minutes, without its unit: 5, ten."""
    if rng.random() < 0.35:
        word = rng.choice(list(NUMBER_WORDS))
        return word, {"minutes": NUMBER_WORDS[word]}
    minutes = rng.choice((rng.randint(2, 30), rng.randrange(5, 181, 5)))
    return str(minutes), {"minutes": minutes}


def slot_minutes(rng):
    """A duration with its unit: 5 minutes, ten mins, half an hour."""
    if rng.random() < 0.15:
        words, minutes = rng.choice((("half an hour", 30), ("an hour", 60), ("two hours", 120)))
        return words, {"minutes": minutes}
    number, arguments = slot_number(rng)
    return f"{number} {rng.choice(('minutes', 'minutes', 'mins', 'min'))}", arguments


def slot_job(rng):
    """What a timer is for."""
    dish = f"{rng.choice(DISH_KINDS)} {rng.choice(DISHES)}"
    job = rng.choice((dish, dish, rng.choice(DISHES), rng.choice(CHORES)))
    return job, {"label": job}


def slot_title(rng):
    title = f"{rng.choice(TOPICS)} {rng.choice(EVENT_KINDS)}"
    return title, {"title": title}


def person(rng):
    """A first name, and a last name two times in five."""
    first = rng.choice(FIRST_NAMES)
    return said(rng, f"{first} {rng.choice(LAST_NAMES)}" if rng.random() < 0.4 else first)


def listing(rng, values):
    """The values as people list them: a, b and c."""
    *first, last = values
    return (", ".join(first) + rng.choice((" and ", " and ", " & ")) if first else "") + last


def slot_people(rng):
    """One to three guests."""
    guests = distinct(rng, person, rng.choice((1, 1, 2, 3)))
    return listing(rng, guests), {"attendees": guests}


def distinct(rng, draw, count):
    """`count` different values of draw(rng), in the order drawn."""
    values = []
    while len(values) < count:
        value = draw(rng)
        if value.lower() not in [old.lower() for old in values]:
            values.append(value)
    return values


def slot_name(rng):
    name = rng.choice(("mom", "dad", "grandma")) if rng.random() < 0.06 else person(rng)
    return name, {"recipient": name}


def slot_text(rng):
    """A statement to pass on: it also reads well after "that"."""
    thing = f"{rng.choice(THING_KINDS)} {rng.choice(THINGS)}"
    spot, name, weekday = rng.choice(SPOTS), rng.choice(FIRST_NAMES), rng.choice(WEEKDAYS)
    event = f"{rng.choice(TOPICS)} {rng.choice(EVENT_KINDS)}"
    text = rng.choice((
        f"i'm running {rng.randrange(5, 50, 5)} minutes late",
        f"i left the {thing} at the {spot}",
        f"i can't find the {thing}",
        f"i found your {thing} at the {spot}",
        f"i'll bring the {thing} on {weekday}",
        f"we need more {rng.choice(FOOD)}",
        f"we're out of {rng.choice(FOOD)} and {rng.choice(HOUSEHOLD)}",
        f"the {event} moved to {weekday}",
        f"the {event} is cancelled",
        f"the {event} went really well",
        f"{name} is coming to the {event}",
        f"{name} has the {thing}",
        f"i'm waiting at the {spot}",
        f"dinner is ready, we're having {rng.choice(DISH_KINDS)} {rng.choice(DISHES)}",
        f"{name} says hi",
        f"i can't make it to the {event}",
    ))
    return text, {"text": text}


def slot_app(rng):
    """How to send it: on whatsapp, by email."""
    app, ways = rng.choice((
        ("whatsapp", ("on", "via", "over")), ("telegram", ("on", "via", "over")), ("email", ("by", "via")),
    ))
    return f"{rng.choice(ways)} {app}", {"app": app}


def slot_ping(rng):
    """An app used as a verb."""
    app = rng.choice(("email", "whatsapp"))
    return app, {"app": app}


def slot_city(rng):
    city = said(rng, rng.choice(CITIES))
    return city, {"city": city}


def slot_units(rng):
    units = rng.choice(("celsius", "fahrenheit"))
    return f"in {units}", {"units": units}


def slot_room(rng):
    room = rng.choice(("kitchen", "bedroom", "living room", "bathroom", "hallway", "office"))
    return room, {"room": room}


def slot_switch(rng):
    """The verb that switches: turn on, shut off."""
    words, on = rng.choice((
        ("turn on", True), ("switch on", True), ("turn off", False), ("switch off", False), ("shut off", False),
    ))
    return words, {"on": on}


def slot_on_off(rng):
    on = rng.random() < 0.5
    return "on" if on else "off", {"on": on}


def slot_percent(rng):
    """A brightness: 40%, 40 percent, forty percent."""
    if rng.random() < 0.25:
        word = rng.choice(("ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"))
        return f"{word} percent", {"brightness": NUMBER_WORDS[word]}
    percent = rng.randrange(5, 101, 5)
    return f"{percent}{rng.choice(('%', ' percent'))}", {"brightness": percent}


def slot_color(rng):
    color = rng.choice(("white", "red", "green", "blue", "purple", "orange"))
    return color, {"color": color}


def place(rng):
    """An address or a landmark, without an article so that there is one way to copy it."""
    if rng.random() < 0.5:
        street = f"{rng.choice(STREETS)} {rng.choice(('Street', 'Road', 'Avenue', 'Lane'))}"
        return said(rng, f"{rng.randint(1, 99)} {street}")
    return said(rng, f"{rng.choice(STREETS + LAST_NAMES)} {rng.choice(LANDMARKS)}")


def slot_from(rng):
    start = place(rng)
    return start, {"trip": {"from": start}}


def slot_to(rng):
    goal = place(rng)
    return goal, {"trip": {"to": goal}}


def slot_riders(rng):
    word = rng.choice(("two", "three", "four", "five", "six"))
    number = NUMBER_WORDS[word]
    return f"{rng.choice((word, number))} {rng.choice(('people', 'people', 'passengers'))}", {"passengers": number}


def slot_money(rng):
    """An amount and its currency: 19.99 euros, fifty pounds."""
    currency = rng.choice(CURRENCIES)
    if rng.random() < 0.15:
        word = rng.choice(list(NUMBER_WORDS))
        return f"{word} {currency}", {"amount": NUMBER_WORDS[word], "from_currency": currency}
    cents = 0 if currency == "yen" else rng.choice((0.25, 0.5, 0.75, 0.95, 0.99))
    amount = rng.choice((rng.randint(2, 99), rng.randrange(50, 5000, 10), rng.randint(2, 200) + cents))
    return f"{amount} {currency}", {"amount": amount, "from_currency": currency}


def slot_currency(rng):
    """The currency to convert into."""
    currency = rng.choice(CURRENCIES)
    return currency, {"to_currency": currency}


# {city} in a phrasing calls slot_city, and so on for every function above whose name begins with slot_.
SLOTS = {name.removeprefix("slot_"): value for name, value in list(globals().items()) if name.startswith("slot_")}

# --- 3 phrasings of a request for one call --------------------------------------------------------------------

PHRASES = {
    "set_alarm": [
        "wake me up at {morning} {day}",
        "wake me at {morning}",
        "wake me up {day} at {morning}",
        "can you wake me at {morning}",
        "i need to be up by {morning} {day}, set an alarm",
        "set an alarm for {time}",
        "set an alarm for {time} {day}",
        "set my alarm to {time} {repeat}",
        "alarm at {time} {day}",
        "alarm for {clock} would be great",
        "{clock} alarm {day}",
        "gimme an alarm at {time}",
        "i want an alarm {repeat} at {time}",
        "make an alarm for {time} please",
        "set me an alarm for {time} {day}",
        "set a {clock} alarm {day}",
        "new alarm {day} at {time}",
        "could you set up an alarm {repeat} at {time}",
        "don't let me oversleep, alarm at {time} {day}",
        "my alarm should ring at {time} {day}",
        "ring me awake at {morning} {day}",
        "i've got an early start {day}, wake me at {morning}",
        "early start {day}, get me up at {morning}",
        "long day, hmm, let's do an alarm at {time}",
        "i have to get up at {morning} {day} so set the alarm",
        "would you mind setting an alarm for {time} {day}",
        "how about an alarm {day} at {time}, yes, do that",
        "schedule an alarm {repeat} for {time}",
        "i'm off to sleep, wake me up at {morning}",
        "alarm {repeat} at {clock}",
    ],
    "set_timer": [
        "set a timer for {minutes}",
        "start a timer for {minutes}",
        "timer for {minutes}",
        "timer {minutes}, go",
        "{number} minute timer please",
        "{number} min timer for the {job}",
        "set a {number} minute timer for the {job}",
        "count down {minutes}",
        "start a {number} minute countdown",
        "countdown of {minutes} for the {job}",
        "can you time {minutes} for me",
        "i need a timer for {minutes}",
        "i need a {number} minute timer for my {job}",
        "gimme {minutes} on the timer",
        "put {minutes} on the clock for the {job}",
        "put {minutes} on the clock",
        "set a timer please, {minutes} for the {job}",
        "it's {minutes} for my {job}, can you time it",
        "let me know in {minutes}",
        "tell me after {minutes}",
        "could you start the timer, {minutes} for the {job}",
        "set a timer called {job} for {minutes}",
        "timer named {job}, {minutes}",
        "start the {job} timer with {minutes}",
        "beep in {minutes}",
        "buzz me in {minutes}, it's for the {job}",
        "hmm how long was it, right, {minutes}, start the timer",
        "back to work soon, timer for {minutes}",
        "would you run a timer for {minutes}",
        "quick timer, {minutes}",
    ],
    "create_calendar_event": [
        "put a {title} in my calendar {day} at {time}",
        "put a {title} with {people} in my calendar {day} at {time}",
        "schedule a {title} {day} at {time}",
        "schedule a {title} with {people} {day} at {time}",
        "schedule a {title} {day} at {time} with {people}",
        "add a {title} to my calendar, {day} at {time}",
        "add a {title} at {time} {day} to my calendar",
        "create an event called {title} {day} at {time}",
        "create a calendar event {day} at {time}, title {title}",
        "new event: {title}, {day} at {time}",
        "new calendar entry: {title} {day}, {clock}",
        "calendar: {title} {day} {clock}",
        "book a {title} with {people} {day} at {time}",
        "i have a {title} {day} at {time}, put it in my calendar",
        "i've got a {title} at {time} {day}, add it to the calendar",
        "i'm meeting {people} for a {title} {day} at {time}, note it in my calendar",
        "there's a {title} {day} at {time}, can you block that in my calendar",
        "block my calendar {day} at {time} for a {title} with {people}",
        "set up a {title} with {people} for {time} {day}",
        "set up a {title} {day} at {time} and invite {people}",
        "plan a {title} {day} at {time}",
        "plan a {title} {day} at {time} and invite {people}",
        "pencil in a {title} {day} at {time}",
        "could you make a calendar event for the {title} {day} at {time}",
        "the {title} is {day} at {time}, save it in my calendar",
        "they moved the {title}, so now it's {day} at {time}, put it in the calendar",
        "before i forget, {title} {day} at {time}, into the calendar with it",
        "{day} at {time} i have a {title}, add it to my calendar",
        "let's see, {day} at {time} works, schedule the {title} then",
        "mark my calendar for the {title} {day} at {time}",
    ],
    "send_message": [
        "text {name} that {text}",
        "text {name}: {text}",
        'text {name} "{text}"',
        "text {name} saying {text}",
        "tell {name} that {text}",
        "tell {name} {app} that {text}",
        "let {name} know that {text}",
        "let {name} know {app} that {text}",
        "message {name} that {text}",
        "message {name} {app}: {text}",
        "send {name} a message: {text}",
        "send a message to {name}: {text}",
        "send a message to {name} {app} saying {text}",
        'send "{text}" to {name}',
        'send "{text}" to {name} {app}',
        "send {name} a text that says {text}",
        "shoot {name} a message {app}: {text}",
        "shoot {name} a text saying {text}",
        "write to {name} that {text}",
        "write {name} a message {app} that says {text}",
        "write to {name} {app}: {text}",
        "{ping} {name} that {text}",
        "{ping} {name}: {text}",
        'can you {ping} {name} "{text}"',
        "could you text {name} for me, say that {text}",
        "can you let {name} know that {text}",
        "i need to reach {name}, send this {app}: {text}",
        "i forgot to tell {name}, please write that {text}",
        "ping {name} {app} and say {text}",
        "message for {name}: {text}",
    ],
    "get_weather": [
        "what's the weather in {city}",
        "what's the weather like in {city} {when}",
        "how's the weather in {city} {when}",
        "weather in {city} {when}",
        "weather {when} in {city}",
        "weather for {city} {units} please",
        "{city} weather {when}",
        "{city} forecast {when} {units}",
        "will it rain in {city} {when}",
        "is it gonna rain {when} in {city}",
        "is it raining in {city}",
        "will it snow in {city} {when}",
        "do i need an umbrella in {city} {when}",
        "how hot will it get in {city} {when}",
        "how hot is it in {city} {units}",
        "how cold is it in {city}",
        "how cold will {city} be {when} {units}",
        "temperature in {city} {units}",
        "what will the temperature be in {city} {when}",
        "give me the forecast for {city} {when}",
        "forecast for {city}, {units}, thanks",
        "can you check the weather in {city} {when}",
        "could you look up the weather for {city}",
        "i'm flying to {city} {when}, what's the weather like",
        "we're driving to {city} {when}, is it going to be sunny",
        "packing for {city}, what's the forecast {when}",
        "my sister lives in {city}, will it be warm there {when}",
        "tell me the weather in {city} {when} {units}",
        "any chance of snow in {city} {when}",
        "i want the {city} weather {when} {units}",
    ],
    "control_light": [
        "{switch} the {room} lights",
        "{switch} the lights in the {room}",
        "{switch} the light in the {room}",
        "can you {switch} the {room} light",
        "turn the {room} lights {on_off}",
        "{room} lights {on_off} please",
        "lights {on_off} in the {room}",
        "it's me again, {room} lights {on_off}",
        "could you get the {room} lights {on_off}",
        "dim the {room} lights to {percent}",
        "dim the {room} to {percent}",
        "set the {room} lights to {percent}",
        "set the {room} lamp to {color}",
        "set the brightness in the {room} to {percent}",
        "{room} lights at {percent}",
        "{room} lights to {color}",
        "make the {room} lights {color}",
        "make the {room} lights {color} at {percent}",
        "change the {room} lights to {color}",
        "make the {room} lights {color} and set them to {percent}",
        "switch the {room} lamp to {color}",
        "{switch} the {room} lamp",
        "i want {color} lights in the {room}",
        "i want the {room} at {percent} brightness",
        "bring the {room} lights to {percent}",
        "{percent} brightness in the {room}",
        "party mode, {room} lights {color}",
        "movie night, dim the {room} lights to {percent}",
        "the {room} doesn't look right, set the lights to {percent}",
        "i want to read in the {room}, set the lights to {percent}",
        "i'm in the {room}, {switch} the lights",
        "before i sit down, {switch} the {room} lights",
        "{switch} the {room} lights and set them to {color}",
        "let's have the {room} lights in {color}",
        "would you mind dimming the {room} lights to {percent}",
        "{color} light for the {room}, {percent}",
    ],
    "book_taxi": [
        "book a taxi from {from} to {to}",
        "book a taxi from {from} to {to} at {time}",
        "book a taxi from {from} to {to} for {riders}",
        "book me a cab from {from} to {to} at {time} for {riders}",
        "get me a taxi from {from} to {to}",
        "get me a cab at {time} from {from} to {to}",
        "call a cab from {from} to {to}",
        "call me a taxi from {from} to {to} at {time}",
        "order a taxi from {from} to {to}",
        "order a cab for {riders} from {from} to {to}",
        "i need a taxi from {from} to {to}",
        "i need a taxi at {time} from {from} to {to}",
        "i need a cab for {riders} from {from} to {to} at {time}",
        "we need a taxi for {riders} from {from} to {to}",
        "we're {riders} going from {from} to {to}, get a taxi",
        "taxi from {from} to {to}",
        "taxi from {from} to {to}, {clock}",
        "taxi at {time}, from {from} to {to}",
        "cab for {riders}, {from} to {to}",
        "can you get a taxi from {from} to {to}",
        "could you book a cab to {to} from {from}",
        "pick me up at {from} and take me to {to}, by taxi",
        "have a taxi pick me up from {from} at {time}, i'm going to {to}",
        "i'm at {from} and have to get to {to}, book a taxi",
        "i'm at {from}, need a cab to {to}",
        "i have to be picked up from {from} at {time}, taxi to {to}",
        "get us from {from} to {to} by taxi, {riders}",
        "need a ride from {from} to {to}",
        "need a ride for {riders} from {from} to {to} at {time}",
        "my car broke down, taxi from {from} to {to}",
        "i've missed the last bus, get a cab from {from} to {to}",
        "send a cab to {from}, i want to go to {to}",
        "reserve a taxi for {clock} from {from} to {to}",
        "how about a taxi from {from} to {to} for {riders}, yes, book it",
    ],
    "convert_currency": [
        "convert {money} to {currency}",
        "convert {money} into {currency}",
        "can you convert {money} to {currency}",
        "please convert {money} into {currency} for me",
        "change {money} to {currency}",
        "change {money} into {currency} for me",
        "what's {money} in {currency}",
        "what is {money} in {currency} right now",
        "what would {money} be in {currency}",
        "what does {money} come to in {currency}",
        "how much is {money} in {currency}",
        "how much is {money} worth in {currency}",
        "how much would {money} be in {currency}",
        "how many {currency} is {money}",
        "how many {currency} do i get for {money}",
        "how much in {currency} makes {money}",
        "how many {currency} would i get for {money}",
        "{money} in {currency} please",
        "{money} to {currency}",
        "{money} in {currency}, roughly",
        "i have {money}, what is that in {currency}",
        "i've got {money} left, how many {currency} is that",
        "i paid {money}, tell me that in {currency}",
        "it costs {money}, what's that in {currency}",
        "they want {money} for it, hmm, in {currency} that is how much",
        "the hotel charges {money}, give me that in {currency}",
        "my friend owes me {money}, convert it to {currency}",
        "tell me what {money} is in {currency}",
        "give me {money} in {currency}",
        "could you work out {money} in {currency}",
        "exchange {money} to {currency}",
        "if i swap {money} for {currency}, how much do i get",
        "i want to know how much {money} makes in {currency}",
        "quick maths, {money} to {currency}",
    ],
}

# --- 4 requests for several calls: " | " ends the words of one call -------------------------------------------

# One call each; a message stands in quotes, so that it is plain where it ends.
MIXED = {
    "set_alarm": [
        "set an alarm for {time}",
        "wake me at {morning} {day}",
        "set an alarm for {time} {day}",
        "wake me up at {morning} {repeat}",
    ],
    "set_timer": [
        "set a timer for {minutes}",
        "start a {number} minute timer",
        "start a timer for {minutes} for the {job}",
        "set a {number} minute timer for the {job}",
    ],
    "create_calendar_event": [
        "put a {title} in my calendar {day} at {time}",
        "schedule a {title} {day} at {time}",
        "schedule a {title} with {people} {day} at {clock}",
        "add a {title} to my calendar {day} at {clock}",
    ],
    "send_message": [
        'text {name} "{text}"',
        'send "{text}" to {name}',
        'send "{text}" to {name} {app}',
        'message {name} {app} "{text}"',
    ],
    "get_weather": [
        "check the weather in {city}",
        "tell me the weather in {city} {when}",
        "give me the forecast for {city} {when}",
        "look up the weather for {city} {units}",
    ],
    "control_light": [
        "{switch} the {room} lights",
        "turn the {room} lights {on_off}",
        "dim the {room} lights to {percent}",
        "make the {room} lights {color}",
    ],
    "book_taxi": [
        "book a taxi from {from} to {to}",
        "get me a cab from {from} to {to} at {time}",
        "book a taxi for {riders} from {from} to {to}",
    ],
    "convert_currency": [
        "convert {money} to {currency}",
        "tell me what {money} is in {currency}",
        "convert {money} into {currency}",
    ],
}
JOINERS = [" and ", " and ", ", and ", ", then ", " and then ", ", also ", " and also ", ". oh and "]

# The same tool twice.
PAIRS = {
    "set_alarm": [
        "set alarms for {clock} | and {clock}",
        "set one alarm at {time} {day} | and one at {time} {day}",
        "wake me at {morning} {day} | and at {morning} {day}",
    ],
    "set_timer": [
        "set two timers, {minutes} | and {minutes}",
        "start a timer for {minutes} for the {job} | and one for {minutes} for the {job}",
        "two timers: {minutes} for the {job} | and {minutes} for the {job}",
    ],
    "send_message": [
        'text {name} "{text}" | and {name} "{text}"',
        'send "{text}" to {name} | and "{text}" to {name}',
    ],
    "get_weather": [
        "what's the weather in {city} | and in {city}",
        "weather in {city} | and {city}",
        "compare the weather in {city} | and {city}",
        "is it raining in {city} | or in {city}",
        "what's the weather in {city} {when} | and in {city} {when}",
    ],
    "control_light": [
        "{switch} the {room} lights | and {switch} the {room} lights",
        "turn the {room} lights {on_off} | and the {room} lights {on_off}",
        "set the {room} lights to {percent} | and the {room} lights to {percent}",
        "make the {room} lights {color} | and the {room} lights {color}",
    ],
    "book_taxi": [
        "book a taxi from {from} to {to} | and another from {from} to {to}",
        "we need two cabs, one from {from} to {to} | and one from {from} to {to}",
    ],
    "convert_currency": [
        "convert {money} to {currency} | and {money} to {currency}",
        "how much is {money} in {currency} | and {money} in {currency}",
    ],
}

# --- 5 requests without a call: small talk, a missing value, things no tool can do; by their answer -----------

NO_CALL = {
    "Hello! What can I do for you?": [
        "hello there", "hi assistant", "are you there", "good morning", "good evening", "hiya", "hello again",
    ],
    "You're welcome!": [
        "thanks a lot", "thank you so much", "thx for that", "cheers, that helped", "perfect, thanks", "thanks buddy",
        "great, thank you",
    ],
    "I'm doing well, thanks for asking!": [
        "how are you", "how are you doing today", "how's it going", "are you feeling ok today", "how have you been",
    ],
    "Goodbye, take care!": [
        "goodbye", "bye for now", "see you later", "talk to you later", "that's all, bye", "gotta go, bye",
    ],
    "Good night, sleep well!": [
        "good night", "night night", "i'm going to bed, good night", "sleep tight", "good night my friend",
    ],
    "That's kind of you to say!": [
        "you're the best", "you are so smart", "i like talking to you", "you're doing a great job", "you're awesome",
    ],
    "Okay, never mind.": [
        "never mind", "forget it", "forget what i said", "no wait, cancel that", "don't bother", "nah, drop it",
    ],
    "I'm an assistant that can use your tools.": [
        "who are you", "what are you exactly", "are you a robot", "are you human", "what's your name",
    ],
    "How long should the timer run?": [
        "set a timer for the {job}", "start a timer", "i need a timer for my {job}", "can you time the {job} for me",
        "timer for the {job}", "set a timer please",
    ],
    "Sorry, I can't make phone calls.": [
        "call {name}", "give {name} a call", "can you phone {name}", "ring {name} for me",
        "start a video call with {name}",
    ],
    "Sorry, I can't order things for you.": [
        "order me a pizza", "order a burger for dinner", "buy two tickets to the opera", "order new shoes online",
        "can you buy me a new laptop",
    ],
    "Sorry, I can't look that up.": [
        "who won the match last night", "how tall is mount everest", "what's in the news today", "who wrote hamlet",
        "what's the capital of peru", "how many people live in china", "how far is the moon", "who painted the mona lisa",
    ],
    "Sorry, I can't control that device.": [
        "turn up the heating", "lock the front door", "start the robot vacuum", "open the blinds in the {room}",
        "turn on the tv in the {room}", "turn off the oven", "set the thermostat to 21 degrees",
        "close the garage door",
    ],
}

# --- 6 noise around a request ---------------------------------------------------------------------------------

OPENERS = [
    "hey", "hi,", "ok", "okay so", "um,", "uh", "yo", "hey there,", "alright,", "right,", "so", "oh,", "hmm", "well,",
    "quick one,", "let me think, ok,", "sorry to bother you but", "real quick,", "one more thing,", "ok cool,",
    "oh and", "morning!", "listen,", "hello,", "hey assistant,", "ah yes,", "good morning,", "excuse me,",
]
SHORT_OPENERS = ["hey", "um,", "uh,", "ok", "oh,", "well,", "hmm,", "so"]
CLOSERS = [" please", ", please", " pls", ", thanks", " thx", ", thank you", " if you can", ", cheers", ", ta", " :)"]
# Slots of free words: a closer right behind one could be read as a part of its value.
OPEN_ENDED = (
    "{text}", '"', "{job}", "{title}", "{people}", "{to}",
)
SLANG = {"please": "pls", "you": "u", "your": "ur", "want to": "wanna", "have to": "gotta", "thanks": "thx"}


def misspell(rng, template):
    """The template with one slip of the finger in a longer word; slots, and so values, stay as they are."""
    words = template.split(" ")
    places = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    if not places:
        return template
    i = rng.choice(places)
    word = words[i]
    k = rng.randrange(1, len(word) - 1)
    words[i] = rng.choice((
        word[:k] + word[k + 1] + word[k] + word[k + 2 :],  # two letters swapped
        word[:k] + word[k + 1 :],  # one left out
        word[:k] + word[k] + word[k:],  # one typed twice
    ))
    return " ".join(words)


def add_noise(rng, template, openers=OPENERS, closers=CLOSERS):
    """The template with slang, a typo, an opener, a closer or a capital, each now and then."""
    open_ended = template.endswith(OPEN_ENDED)
    polite_end = template.endswith(("please", "thanks"))
    has_opener = any(opener.split()[0].strip(",") == re.split("[ ,]", template)[0] for opener in openers)
    if rng.random() < 0.25:
        for plain, slang in SLANG.items():
            template = re.sub(rf"\b{plain}\b(?!')", slang, template)
    if rng.random() < 0.1:
        template = misspell(rng, template)
    if not has_opener and rng.random() < 0.4:
        template = f"{rng.choice(openers)} {template}"
    if closers and not open_ended and not polite_end and rng.random() < 0.3:
        template += rng.choice(closers)
    elif not open_ended and rng.random() < 0.2:
        template += rng.choice((".", " ..."))
    # A slot at the start begins with "{" and so keeps its own case: its value is copied as typed.
    return template[0].upper() + template[1:] if rng.random() < 0.3 else template


# --- 7 rows ---------------------------------------------------------------------------------------------------


def fill(rng, template):
    """The template with its slots filled, and the arguments that they mean."""
    arguments = {}

    def put(match):
        words, found = SLOTS[match[1]](rng)
        for name, value in found.items():
            if isinstance(value, dict):  # two slots fill one nested object
                value = arguments.get(name, {}) | value
            arguments[name] = value
        return words

    text = re.sub(r"{(\w+)}", put, template)
    return re.sub(r"\ba (?=8|1[18]\b|eight)", "an ", text), arguments  # an 8 minute timer


def in_schema_order(schema, arguments):
    """The arguments in the order of their schema: one order to learn, whatever the order of the request."""
    missing = [name for name in schema["required"] if name not in arguments]
    if missing:
        raise SystemExit(f"error: a phrasing gives no value for {', '.join(missing)}: {arguments}")
    return {
        name: in_schema_order(part, arguments[name]) if part["type"] == "object" else arguments[name]
        for name, part in schema["properties"].items()
        if name in arguments
    }


def makes_sense(calls):
    """False where a call goes from one place or currency to the same one, or two calls set the same thing."""
    for call in calls:
        values = call["arguments"].get("trip", call["arguments"])
        texts = [value.lower() for value in values.values() if isinstance(value, str)]
        if len(texts) != len(set(texts)):
            return False
    rooms = [call["arguments"]["room"] for call in calls if "room" in call["arguments"]]
    return len(rooms) == len(set(rooms)) and all(calls.count(call) == 1 for call in calls)


def single_row(rng, tools, name, template):
    text, arguments = fill(rng, add_noise(rng, template))
    call = {"name": name, "arguments": in_schema_order(tools[name], arguments)}
    return text, {"function_call": call}


def parallel_row(rng, tools):
    """A request for the same tool twice (one in three), or for two or three different tools."""
    if rng.random() < 1 / 3:
        name = rng.choice(list(PAIRS))
        parts, names = rng.choice(PAIRS[name]).split(" | "), [name, name]
        parts[1] = " " + parts[1]
    else:
        names = rng.sample(list(MIXED), rng.choice((2, 2, 2, 3)))
        parts = [rng.choice(MIXED[name]) for name in names]
        joiners = [", "] * (len(parts) - 2) + [rng.choice(JOINERS)]
        parts[1:] = [joiner + part for joiner, part in zip(joiners, parts[1:])]
    if rng.random() < 0.3:
        parts[0] = f"{rng.choice(OPENERS)} {parts[0]}"
    filled = [fill(rng, part) for part in parts]
    calls = [
        {"name": name, "arguments": in_schema_order(tools[name], arguments)}
        for name, (_, arguments) in zip(names, filled)
    ]
    return "".join(text for text, _ in filled), {"function_calls": calls}


def no_call_row(rng, answer):
    text, _ = fill(rng, add_noise(rng, rng.choice(NO_CALL[answer]), SHORT_OPENERS, closers=()))
    return text, {"content": answer}


def first_new(seen, draw, least=1, most=99):
    """The first row of draw() that is new, sensible and of `least` to `most` words."""
    for _ in range(1000):
        text, output = draw()
        folded = " ".join(text.casefold().split())
        calls = output.get("function_calls") or [output.get("function_call", {"arguments": {}})]
        if folded not in seen and least <= len(text.split()) <= most and makes_sense(calls):
            seen.add(folded)
            return {"input": text, "output": output}
    raise SystemExit(f"error: no new request after 1000 draws, the last one was {text!r}: add phrasings or values")


def make_rows(seed, count):
    """`count` rows: as good as equal shares of every tool, phrasing and answer, in random order."""
    rng = random.Random(seed)
    tools = json.loads((HERE / "tools.json").read_text(encoding="utf-8"))
    tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    no_calls, parallels = round(count * NO_CALL_SHARE), round(count * PARALLEL_SHARE)
    names, answers, seen, rows = list(PHRASES), list(NO_CALL), set(), []
    decks = {name: rng.sample(phrases, len(phrases)) for name, phrases in PHRASES.items()}
    for i in range(count - no_calls - parallels):
        name = names[i % len(names)]
        template = decks[name][i // len(names) % len(decks[name])]
        rows.append(first_new(seen, lambda: single_row(rng, tools, name, template), *SINGLE_WORDS))
    for _ in range(parallels):
        rows.append(first_new(seen, lambda: parallel_row(rng, tools), *PARALLEL_WORDS))
    for i in range(no_calls):
        rows.append(first_new(seen, lambda: no_call_row(rng, answers[i % len(answers)])))
    rng.shuffle(rows)
    return rows


def main():
    parser = argparse.ArgumentParser(description="Write the synthetic tool-calling dataset.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=HERE / "synthetic_finetune_dataset.json", help="file to write")
    parser.add_argument("--seed", type=int, default=SEED, help=f"same seed, same bytes (default {SEED})")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"number of rows (default {ROWS})")
    args = parser.parse_args()
    lines = [json.dumps(row, ensure_ascii=False) for row in make_rows(args.seed, args.rows)]
    # Bytes, not text: no platform turns the line ends into its own.
    args.output.write_bytes(("[\n" + ",\n".join(lines) + "\n]\n").encode("utf-8"))
    print(f"{len(lines)} rows written to {args.output}")


if __name__ == "__main__":
    main()
