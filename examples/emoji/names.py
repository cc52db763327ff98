"""One name for the same thing in all emoji sets."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

TONE = re.compile(r"(?<!traffic)-(?:medium-)?(?:light|medium|dark)$")
TONES = re.compile(r"skin-tone|-tone\d")
FLAG = re.compile(r"^flag-for-(?:flag-)?")
ENGLISH = {"oclock": "o'clock", "mans": "man's", "womans": "woman's", "ii": "2", "piata": "pinata"}
COMPOUNDS = {"e-mail", "t-shirt", "x-ray"}

MISNAMED = {
    "fxemoji": {
        "astonished": "knocked out face", "cat": "cat face", "dog": "dog face", "kiss": "kissing face",
        "mouse": "mouse face", "pig": "pig face", "rabbit": "rabbit face", "tiger": "tiger face",
    },
}  # fmt: skip
"""Names that mean something else in the other sets."""
BROKEN = {
    "fxemoji": {"fog", "grapes", "heartblue", "tramcar"},
    "noto-v1": {
        "asterisk", "pound-symbol", "digit-zero", "digit-one", "digit-two", "digit-three", "digit-four", "digit-five",
        "digit-six", "digit-seven", "digit-eight", "digit-nine",
    },
}  # fmt: skip
"""Drawings of which a part is missing, or white on white."""
SYNONYMS = """
anger symbol: anger
angry face with horns: devilhorns
angry face: angry
anguished face: anguish
anxious face with sweat: coldsweat
back arrow: backwithleftwardsarrow
backhand index pointing down: down
backhand index pointing left: left
backhand index pointing right: right
backhand index pointing up: up
beach with umbrella: beachumbrella
bell with slash: bellcancellation
bell: ringingbell
bookmark tabs: bookmarktab
bouquet: bouquetofflowers
bright button: highbrightness
bullet train: highspeedtrainbulletnose
bullseye: direct-hit
cat: catside
chart decreasing: chartdownwardstrend
chart increasing with yen: chartupwardstrendyen
chart increasing: chartupwardstrend
clapping hands: clap
clockwise vertical arrows: clockwisedownupcircledarrows
closed mailbox with lowered flag: closedmailboxlowered
closed mailbox with raised flag: closedmailboxraised
cloud with lightning: stormcloud
cloud with rain: raincloud
cloud with snow: snowcloud
clutch bag: makeupbag
confetti ball: confetti
confounded face: confounded
confused face: confused
construction worker: construct
control knobs: controlknob
counterclockwise arrows button: anticlockwiseupwardsanddownwardsarrows
couple with heart: couple
cross mark: ballotboldscriptx
crying face: crying
dashing away: dash
deaf man: man-deaf
deaf person: person-deaf
deaf woman: woman-deaf
detective: sleuthspy
diamond with a dot: diamondshapewithdotinside
dim button: lowbrightness
disappointed face: disappointed
dog: dogside
dollar banknote: banknotedollar
dotted six pointed star: sixpointedstarwithdot
double exclamation mark: doubleexclaimationmark
downcast face with sweat: sweat
downwards button: downpointingsmallredtrisngle
dragon face: dragonhead
dragon: dragonside
droplet: blackdroplet
eight spoked asterisk: eightspokedasterix
elf: person-elf
end arrow: endwithleftwardsarrow
enraged face: pouting-face pouting
envelope with arrow: envelopedownarrowabove
euro banknote: banknoteeuro
evergreen tree: evergreen
exclamation question mark: exclaimationquestionmark
expressionless face: expressionless
face blowing a kiss: kissing
face screaming in fear: screamfear
face with medical mask: medicalmask
face with open mouth: openmouth
face with steam from nose: triumph
face with tears of joy: grintears
face with tongue: tongueout
face without mouth: nomouth
fairy: person-fairy
fallen leaf: fallingleaf
fast down button: blackdownpointingdoublearrow
fast forward button: blackrightpointingdoublearrow
fast reverse button: blackleftpointingdoublearrow
fast up button: blackuppointingdoublearrow
fax machine: faxicon
fearful face: fearful
fish cake with swirl: fishcakeswirl
five thirty: clock5thirty
flag china: chineseflag
flag france: franceflag
flag italy: italianflag
flag japan: japanflag
flag russia: russianflag
flag south korea: koreaflag
flag spain: spanishflag
flag united kingdom: greatbritainflag
flexed biceps: flexbicep
floppy disk: floppydisk2
flushed face: flushed
folded hands: pray
four oclock: clock4oclock
four thirty: clock4thirty
framed picture: framewithtiles
front facing baby chick: frontfacingchick
frowning face with open mouth: frownmouth
gem stone: gem
genie: person-genie
globe showing americas: americasglobe
globe showing asia australia: asiaaustraliaglobe
globe showing europe africa: europeafricaglobe
globe with meridians: meridianglobe
goblin: japaneseangrymask
green heart: heartgreen
grimacing face: grimacing
grinning face with big eyes: grin
grinning face with smiling eyes: grineyes
grinning face with sweat: grinsweat
grinning face: grinwide
grinning squinting face: grinsquint
hamster: hampster
hand with fingers splayed: raisedhandsfingerssplayed
hear no evil monkey: monkeyhear
heart with arrow: heartarrow
heart with ribbon: heartribbon
high heeled shoe: heels
high voltage: bolt
hot pepper: chilipepper
hourglass not done: hourglassflowingsand
hushed face: hushed
index pointing up: index
japanese discount button: cjkunifiedideographk
keycap 10: ten
keycap pound: keycap-hashtag
kissing face with closed eyes: kissclosedeyes
kissing face with smiling eyes: kisseyes
knocked out face: face-with-crossed-out-eyes dizzy-face
laptop: oldpersonalcomputer
latin cross: heavylatincross
leaf fluttering in wind: leaffluttering
leopard: leopardside
locked with key: lockandkey
loudly crying face: loudlycrying
loudspeaker: bullhornwithsoundwaves
mage: person-mage
magnifying glass tilted left: leftmagnifyingglass
magnifying glass tilted right: rightmagnifyingglass
mahjong red dragon: mahjong
man blond hair: man-blonde-hair
mans shoe: mensshoe
mantelpiece clock: manltepiececlock
map of japan: silhouetteohjapan
megaphone: bullhorn
men holding hands: guyguy
men with bunny ears: man-with-bunny-ears
men wrestling: man-wrestling
mermaid: woman-merpeople
merman: man-merpeople
merperson: person-merpeople
mobile phone with arrow: phonerightarrowleft
mobile phone: cellphone
mouse: mouseside
mouth: lips
multiply: heavymultiplicationsymbol
musical note: musicdescend
muted speaker: speakercancellation
necktie: tie
neutral face: neutral
no one under eighteen: nooneunder18symbol
notebook with decorative cover: notebookdecorativecover
ok hand: aok
old man: gpa
old woman: gma
on arrow: on-exclamation-arrow onarrowleftright
oncoming fist: fistedhand
one oclock: clock1oclock
one thirty: clock1thirty
open hands: hands
open mailbox with lowered flag: openmailboxlowered
open mailbox with raised flag: openmailboxraised
optical disk: opticaldiscicon
outbox tray: outbox
pensive face: pensive
people with bunny ears: person-with-bunny-ears bunny-ears
people wrestling: person-wrestling
persevering face: perservere
person blond hair: person-blonde-hair blonde
person bowing: bowing
person frowning: frown
person gesturing no: nogesture
person gesturing ok: okgesture
person getting massage: headmassage
person pouting: pout
person raising hand: handup
person running: running
person swimming: swimming
person tipping hand: waitress
person walking: walking
person wearing turban: turban
person with skullcap: guapimao
phoenix: phoenix-bird
pig nose: pigsnout
pig: pigside
pile of poo: poo
pinata: piata
play button: blackrightpointingarrow
police car light: policecarsrevolvinglight
police officer: cop
potable water: potablewatersystem
pound banknote: banknotepound
printer: printericon
purple heart: heartpurple
purse: pinkwallet
pushpin: blackpushpin
question mark: blackquestionmark
rabbit face: bunny
rabbit: bunnyside
racing car: racecar
raised hand: hand
raising hands: high5
relieved face: relieved
repeat button: clockwiserightwardsleftwardscirclearrows
repeat single button: clockwiserightwardsleftwardscirclearrowsone
reverse button: blackleftpointingarrow
ribbon: bow
right arrow curving down: arrowrightwardsdownwards
right arrow curving up: arrowrightwardsupwards
running shoe: mensrunner
sad but relieved face: dissapointedrelief
sagittarius: saggitarius
see no evil monkey: monkeysee
seven oclock: clock7oclock
six oclock: clock6oclock
six thirty: clock6thirty
skull and crossbones: blackskullcrossbones
sleeping face: sleeping
sleepy face: sleepy
slightly frowning face: smallfrown
slightly smiling face: smallsmile
smiling face with halo: halo
smiling face with heart eyes: hearteyes
smiling face with smiling eyes: smileeyes
smirking face: smirk
snow capped mountain: snowmountains
soon arrow: soonwithrightarrow
speak no evil monkey: monkeyspeak
speaker high volume: speaker3soundwaves
speaker medium volume: speakeronesoundwave
spouting whale: spurtingwhale
squinting face with tongue: tongueoutwink2
studio microphone: studiomic
sun behind rain cloud: sunraincloud
sun behind small cloud: whitesunsmallcloud
sun: sunrays whitesun
superhero: person-superhero
supervillain: person-supervillain
sweat droplets: sweatsplash
t shirt: mansshirt
telephone receiver: telephonereceiver2
tennis: tennisball
thought balloon: thoughtbaloon
three oclock: clock3oclock
three thirty: clock3thirty
tiger: tigerside
tired face: tired
tokyo tower: toykotower
top arrow: topwithupwardsarrow
twelve oclock: clock12oclock
twelve thirty: clock12thirty
two hearts: 2hearts
two oclock: clock2oclock
two thirty: clock2thirty
unamused face: unamused
up button: up-exclamation-button squaredup
upwards button: uppointingsmallredtrisngle
vampire: person-vampire
videocassette: videocasette
vulcan salute: raisedhandpartfingers
waning gibbous moon: waningbibbousmoon
water wave: wave
waving hand: waving
weary face: weary
white exclamation mark: whiteexclaimationmark
winking face with tongue: tongueoutwink
winking face: winking
woman and man holding hands: girlguy
woman blond hair: woman-blonde-hair
womans boot: boot
womans clothes: womansshirt
womans sandal: sandals
women holding hands: girlgirl
women with bunny ears: woman-with-bunny-ears
women wrestling: woman-wrestling
worried face: worried
wrapped gift: present
writing hand: leftwritinghand
yellow heart: heartyellow
yen banknote: banknoteyen
zombie: person-zombie
"""
"""What a set calls by another name, found by looking at the pictures: `name: other names`."""

IconSet = Mapping[str, Any]
"""An iconify set: `icons`, `aliases` and, as `chars`, code points and the icons they are drawn by."""


def named(sets: Mapping[str, IconSet], tones: bool = False) -> dict[str, dict[str, str]]:
    """Return for each set its pictures: the name of the thing, and the icon that shows it.

    Names are lower-case words, such as "tiger face", and the same in all sets. Icons that a set has replaced by newer
    ones are left out, as are skin tones other than the plain one, unless `tones`. A set that runs words together
    ("alarmclock") only names things that another set spells.
    """
    icons = {which: _keys(which, shown(data, tones)) for which, data in sets.items()}
    spelled = [which for which, keys in icons.items() if 4 * sum("-" in icon for icon in keys) > len(keys)]
    spellings = [(key, icon) for which in spelled for icon, key in icons[which].items()]
    other = _synonyms(sets.values(), {key for key, _ in spellings})
    words: dict[str, str] = {}
    for key, icon in sorted(spellings, key=lambda pair: pair[0] in other):
        words.setdefault(_resolved(key, other), english(icon))
    found: dict[str, dict[str, str]] = {which: {} for which in sets}
    for which in sets:
        for icon, key in sorted(icons[which].items(), key=lambda pair: pair[1] in other):
            if name := words.get(_resolved(key, other)):
                found[which].setdefault(name, icon)  # of two, the one that has the name itself
    return found


def _keys(which: str, icons: Iterable[str]) -> dict[str, str]:
    wrong, broken = MISNAMED.get(which, {}), BROKEN.get(which, ())
    return {icon: squashed(wrong.get(icon, icon)) for icon in icons if icon not in broken}


def shown(data: IconSet, tones: bool) -> list[str]:
    """Return the icons of a set that are current, with those that are others turned or mirrored."""
    turned = {name for name, alias in data.get("aliases", {}).items() if len(alias) > 1}
    names = {name for name, icon in data["icons"].items() if not icon.get("hidden")} | turned
    return sorted(name for name in names if tones or not toned(name, names))


def toned(name: str, names: set[str]) -> bool:
    """Return whether an icon is another one of `names` in a skin tone: `artist-medium-dark`, `man-light-skin-tone`."""
    plain = TONE.sub("", name)
    return bool(TONES.search(name)) or (plain != name and (plain in names or plain != TONE.sub("", plain)))


def in_style(name: str, style: str) -> str:
    """Return the caption of a picture in a style: "red apple, flat style"."""
    return f"{name}, {style} style"


def english(icon: str) -> str:
    """Return an icon's name as words: `mans-shoe` becomes "man's shoe"."""
    if icon in COMPOUNDS:
        return icon
    return " ".join(ENGLISH.get(word, word) for word in _whole(icon).split("-"))


def squashed(name: str) -> str:
    """Return a name without what sets write differently."""
    return re.sub("[^a-z0-9]", "", _whole(name.lower()))


def _whole(icon: str) -> str:
    return TONE.sub(r"\g<0>-skin-tone", FLAG.sub("flag-", icon))


def _synonyms(sets: Iterable[IconSet], direct: set[str]) -> dict[str, str]:
    """Return names to replace, and by which: from the list above, from aliases, and from Unicode's own names."""
    other: dict[str, str] = {}
    for line in SYNONYMS.strip().splitlines():
        name, _, others = line.partition(": ")
        other |= {squashed(word): squashed(name) for word in others.split()}
    for data in sets:
        same = [(alias, said["parent"]) for alias, said in data.get("aliases", {}).items() if len(said) == 1]
        for points, icon in data.get("chars", {}).items():
            character = [chr(int(point, 16)) for point in points.split("-") if point != "fe0f"]
            if len(character) == 1:
                same.append((unicodedata.name(character[0], ""), icon))
        for alias, icon in same:
            if squashed(alias) not in direct:  # else another set draws something by this name
                other.setdefault(squashed(alias), squashed(icon))
    return {name: by for name, by in other.items() if name and name != by}


def _resolved(name: str, other: Mapping[str, str]) -> str:
    for _ in range(3):  # an alias of a synonym of a synonym
        name = other.get(name, name)
    return name


def styles(found: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """Return for each name the sets that have it."""
    where = defaultdict[str, list[str]](list)
    for which, names in found.items():
        for name in names:
            where[name].append(which)
    return dict(where)
