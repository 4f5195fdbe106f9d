"""Pages of features, static and live.

Reading order; a module imports only from those above it:

  neuronpedia  an index in Neuronpedia's format
  terms        the terms of the pages' help
  records      what a page shows about each feature
  pages        indexes -> a folder of static pages
  fields       the fields of a question, checked
  api          answers to questions about a text, in JSON
  server       the pages, with the live view
"""
