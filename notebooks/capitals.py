"""Prompts of notebooks/wrong_answer.ipynb: places whose largest city tempts.

(place, capital, a larger city), and prompts about other things.
"""

TEMPLATE = 'The capital of {} is the city of'

CAPITALS = (
  ('Australia', 'Canberra', 'Sydney'),
  ('Canada', 'Ottawa', 'Toronto'),
  ('Turkey', 'Ankara', 'Istanbul'),
  ('Switzerland', 'Bern', 'Zurich'),
  ('Morocco', 'Rabat', 'Casablanca'),
  ('Nigeria', 'Abuja', 'Lagos'),
  ('Pakistan', 'Islamabad', 'Karachi'),
  ('China', 'Beijing', 'Shanghai'),
  ('Vietnam', 'Hanoi', 'Saigon'),
  ('South Africa', 'Pretoria', 'Johannesburg'),
  ('New Zealand', 'Wellington', 'Auckland'),
  ('Kazakhstan', 'Astana', 'Almaty'),
  ('Ecuador', 'Quito', 'Guayaquil'),
  ('Scotland', 'Edinburgh', 'Glasgow'),
  ('California', 'Sacramento', 'Hollywood'),
  ('Texas', 'Austin', 'Houston'),
  ('Florida', 'Tallahassee', 'Miami'),
  ('Illinois', 'Springfield', 'Chicago'),
  ('Pennsylvania', 'Harrisburg', 'Philadelphia'),
  ('Michigan', 'Lansing', 'Detroit'),
  ('Ohio', 'Columbus', 'Cleveland'),
)

UNRELATED = (
  'The first president of the United States was George',
  'Water is made of hydrogen and',
  'The opposite of hot is',
  'Two plus two is',
  'Romeo and Juliet was written by William',
  'The sun rises in the',
  'The largest ocean is the Pacific',
  'A week has seven',
  'She closed the door and turned off the',
  'The Mona Lisa was painted by Leonardo da',
)
