"""Names of notebooks/entities.ipynb: known ones, and invented ones.

An invented name joins the first word of one known name to the last word of
another of the same kind and the same half: every word is as frequent among the
invented names as among the known ones.
"""

PEOPLE = (
  'Albert Einstein, Isaac Newton, Charles Darwin, Marie Curie, Galileo '
  'Galilei, William Shakespeare, Charles Dickens, Jane Austen, Mark Twain, '
  'Oscar Wilde, Ernest Hemingway, Virginia Woolf, Leo Tolstoy, Franz Kafka, '
  'Victor Hugo, Abraham Lincoln, George Washington, Thomas Jefferson, Barack '
  'Obama, Donald Trump, Hillary Clinton, Winston Churchill, Margaret '
  'Thatcher, Nelson Mandela, Mahatma Gandhi, Adolf Hitler, Joseph Stalin, '
  'Vladimir Putin, Angela Merkel, Napoleon Bonaparte, Julius Caesar, Martin '
  'Luther, Karl Marx, Sigmund Freud, Immanuel Kant, Friedrich Nietzsche, '
  'Pablo Picasso, Vincent Gogh, Claude Monet, Salvador Dali, Andy Warhol, '
  'Johann Bach, Ludwig Beethoven, Michael Jackson, Elvis Presley, Bob Dylan, '
  'Taylor Swift, Lady Gaga, David Bowie, Freddie Mercury, Tom Cruise, Brad '
  'Pitt, Leonardo DiCaprio, Tom Hanks, Clint Eastwood, Marilyn Monroe, '
  'Charlie Chaplin, Steven Spielberg, Alfred Hitchcock, Stanley Kubrick, '
  'Michael Jordan, Lionel Messi, Cristiano Ronaldo, Roger Federer, Serena '
  'Williams, Tiger Woods, Muhammad Ali, Usain Bolt, Bill Gates, Steve Jobs, '
  'Elon Musk, Jeff Bezos, Mark Zuckerberg, Warren Buffett, Henry Ford, Thomas '
  'Edison, Nikola Tesla, Alan Turing, Stephen Hawking, Neil Armstrong'
).split(', ')

PLACES = (
  'New York, Los Angeles, San Francisco, Las Vegas, Hong Kong, Buenos Aires, '
  'Cape Town, Kuala Lumpur, Tel Aviv, Abu Dhabi, Sri Lanka, Saudi Arabia, '
  'South Africa, North Korea, Costa Rica, Puerto Rico, El Salvador, Silicon '
  'Valley, Wall Street, Mount Everest, Lake Michigan, Salt Lake, Santa '
  'Barbara, Niagara Falls, Grand Canyon, Palm Springs, Monte Carlo, Great '
  'Britain, Soviet Union, Ivory Coast, Red Sea, Gulf Stream'
).split(', ')

WORKS = (
  'Star Wars, Star Trek, Harry Potter, Game Boy, Sherlock Holmes, Mickey '
  'Mouse, Donald Duck, Super Mario, James Bond, Indiana Jones, Jurassic Park, '
  'Pulp Fiction, Fight Club, Toy Story, Iron Man, Spider Man, Moby Dick, Don '
  'Quixote, Robinson Crusoe, Peter Pan, Robin Hood, Coca Cola, General '
  'Motors, Burger King, Goldman Sachs, Rolling Stones, Pink Floyd, Led '
  'Zeppelin, Deep Purple, Black Sabbath, Wikimedia Foundation, Washington '
  'Post'
).split(', ')

KINDS = {'people': PEOPLE, 'places': PLACES, 'works': WORKS}

# The name stands last: its last token has read all of it and nothing else.
TEMPLATES = ('{}', 'I have read a lot about {}')

# What the model is asked about people.
QUESTION = '{} is best known for'


def invented(names: list[str]) -> list[str]:
  """The first word of each name with the last word of one far from it."""
  halves = [name.split() for name in names]
  step = len(names) // 3
  return [
    f'{first} {halves[(i + step) % len(names)][1]}'
    for i, (first, _) in enumerate(halves)
  ]


def rows(names: list[str], kind: str) -> list[tuple[str, bool, str, bool]]:
  """(name, is known, kind, is held out); halves by turns."""
  found = []
  for held_out in (False, True):
    half = names[held_out::2]
    found += [(name, True, kind, held_out) for name in half]
    found += [(name, False, kind, held_out) for name in invented(half)]
  return found
