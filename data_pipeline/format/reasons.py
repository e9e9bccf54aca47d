"""Why a sample has no image, or what it lacks: reasons as they stand in the sidecar.

A module of its own because processes that decode need these names and no Parquet.
"""

NO_IMAGE = "image_missing"
EMPTY_IMAGE = "image_empty"
NOT_AN_IMAGE = "not_an_image"
NOT_A_FILE = "not_a_file"
DUPLICATE_KEY = "duplicate_key"
EMPTY_SHARD = "empty_shard"
COMPRESSED = "compressed_archive"  # the whole file is gzip, zstd, bzip2 or xz: its members have no offsets
MISSING_TEXT = "text_missing"
EMPTY_TEXT = "text_empty"
TEXT_NOT_UTF8 = "text_not_utf8"
BAD_JSON = "bad_json"
END_MARKER_ADDED = "end_marker_added"  # a JPEG that lacked only its end marker has it now
