"""Pages of features, static and live.

Reading order; a module imports only from those above it:

  neuronpedia  an index -> Neuronpedia's files
  pages        indexes -> a folder of static pages
  api          what can be asked about a text, answered in JSON
  server       the pages, served with these questions
"""
