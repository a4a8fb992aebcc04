"""Raw media to shards: probe, normalise, encode, verify, write.

One file per stage, in the order a source passes them: `run` takes the `plan` of the shards, owns the output `folder` or
a share of it, and drives an engine (`engine_local`; `engine_ray`: the same on a cluster), which calls `task` for every
source in a killable process. There `probe` opens the file, `scan` looks at its packets,
`timeline` decides what is shown when, `normalise` decodes and `convert` brings frames into one form, `encode` writes
and `verify` decodes what was written (`keep`: the profile that copies); `audio` places the sound on the video's clock;
`still` handles pictures. Back in the parent `write` makes shards of it. `audit` checks a finished data set, `estimate`
packs a sample.
"""
