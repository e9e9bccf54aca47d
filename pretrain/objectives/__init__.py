"""The parts that losses are made of: plain functions and small modules that know no task and no configuration.

mixing, mixup   what the encoder sees          position, decoder  predictions of a view's tokens
contrastive     InfoNCE of images and texts    losses             dense, category
sigmoid         SigLIP's, rank by rank         pooled             BYOL, SimSiam, SimCLR; their heads
chunks          a batch encoded in parts       balance            gradients in a fixed proportion
text            the text tower, its tokenizer  metrics            collapse and its alarms
keys            randomness by sample           collectives        sums and gathers over ranks
"""
