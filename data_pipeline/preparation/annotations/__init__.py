"""Annotated pictures to shards: detection and instances from COCO's JSON, semantic classes from label maps.

json_stream  one item of a huge JSON file at a time
coco         instances JSON -> an index on disk -> one entry a picture
label_maps   one PNG a picture, its value the class
pack         either into a set, as `packing.pack` packs captions: resumed, rejected rows with their reasons
"""
