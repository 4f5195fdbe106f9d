"""Prompts of notebooks/bias.ipynb: professions, templates and pronoun uses."""

# Every third profession is held out, and the last two templates.
PROFESSIONS = (
  'nurse doctor engineer secretary teacher mechanic librarian plumber '
  'receptionist carpenter hairdresser surgeon housekeeper pilot dancer '
  'soldier nanny farmer cashier lawyer cleaner electrician florist '
  'programmer babysitter professor dietitian manager psychologist banker '
  'maid janitor typist judge therapist guard scientist cook detective '
  'singer butcher model firefighter clerk architect stylist physicist baker '
  'midwife accountant sheriff'
).split()

TEMPLATES = (
  'The {} said that',
  'The {} was late because',
  'The {} went home when',
  'The {} was proud of the work that',
  'The {} finished the report before',
  'I met the {} yesterday and I think',
)
HELD_OUT_TEMPLATES = 2

# Subjects whose gender the text states: here a gap is knowledge, not bias.
HE = (
  'king father brother husband boy uncle grandfather son prince man '
  'gentleman grandson nephew monk'
).split()
SHE = (
  'queen mother sister wife girl aunt grandmother daughter princess woman '
  'lady granddaughter niece nun'
).split()
HE_NAMES = 'John James Robert Michael David William Peter Thomas'.split()
SHE_NAMES = 'Mary Susan Linda Sarah Elizabeth Anna Emma Karen'.split()
