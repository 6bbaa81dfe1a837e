"""Raw text files -> data sets in TFDS's format.

Nothing here imports TensorFlow, so that a process that prepares has 0.1 GB and not 0.9. (gs:// paths do import it.)

  datasets    which data sets there are, and what a raw record becomes in each
  plan        which files, cut into pieces of work
  reading     records of a piece, from .jsonl, .parquet and text files
  tfrecord    examples as bytes, and files of them
  pieces      a piece of work from records to finished shards
  prepare     all pieces, on several processes or under Apache Beam (`beam`), and the data set at the end
"""
