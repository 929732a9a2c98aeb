"""Allow-lists: the names that a checkpoint's pickle may use, by who writes them. None is imported."""

from __future__ import annotations

PLAIN = frozenset(
    {
        "torch.Tensor",
        "torch.device",
        "torch.serialization._get_layout",
        "torch.nn.parameter.Parameter",
        "argparse.Namespace",
        "_codecs.encode",
        *(
            f"numpy.{core}.multiarray.{name}"
            for core in ("core", "_core")
            for name in ("_reconstruct", "scalar")
        ),
        "numpy.ndarray",
        "numpy.dtype",
    }
)
"""What trainers save beside the weights. Never created: each becomes an ``OpaqueObject``."""

NOT_STORED = frozenset(
    {
        "builtins.set",
        "builtins.bytearray",
        "collections.Counter",
        *(
            f"torch._utils._rebuild_{kind}"
            for kind in ("sparse_tensor", "qtensor", "nested_tensor", "meta_tensor_no_storage")
        ),
    }
)
"""What torch.load accepts and no safetensors file can hold. Never created: messages say where it is."""

SHARDS = frozenset(
    {
        "torch._utils._rebuild_wrapper_subclass",
        *(
            f"torch.distributed.{home}.DTensor"
            for home in ("tensor", "_tensor", "_tensor.api", "tensor._api")
        ),
        *(
            f"torch.distributed.{home}.{name}"
            for home in ("tensor.placement_types", "_tensor.placement_types", "tensor._dtensor_spec")
            for name in (
                "Shard",
                "Replicate",
                "Partial",
                "_Partial",
                "_StridedShard",
                "DTensorSpec",
                "TensorMeta",
            )
        ),
        *(f"torch.distributed.{home}.DTensorSpec" for home in ("_tensor._dtensor_spec",)),
        "torch.distributed.tensor._dtensor_spec.ShardOrderEntry",
        "torch.distributed._tensor.placement_types.TensorMeta",
        "torch.distributed.device_mesh.DeviceMesh",
        "torch.distributed.device_mesh._MeshEnv",
        "torch.distributed._mesh_layout._MeshLayout",
        "torch.distributed._mesh_layout._FlatLayout",
        "torch.distributed._shard.sharded_tensor.api.ShardedTensor",
        "torch.distributed._shard.sharded_tensor.api.ShardedTensor.ProcessGroupState",
        "torch.distributed._shard.sharded_tensor.shard.Shard",
        "torch.distributed._shard.sharded_tensor.metadata.ShardedTensorMetadata",
        "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        "torch.distributed._shard.metadata.ShardMetadata",
        "torch.distributed._shard.sharding_spec.chunk_sharding_spec.ChunkShardingSpec",
        "torch.distributed._shard.sharding_spec.api.EnumerableShardingSpec",
        "torch.distributed.remote_device._remote_device",
        "builtins.getattr",
    }
)
"""What the distributed tensors of FSDP1 and FSDP2 name in addition."""

DCP_METADATA = frozenset(
    {
        *(
            f"torch.distributed.checkpoint.metadata.{name}"
            for name in (
                "Metadata",
                "MetadataIndex",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "_MEM_FORMAT_ENCODING",
                "StorageMeta",
            )
        ),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        "torch.serialization._get_layout",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib._local.PosixPath",
    }
)
"""What torch.distributed.checkpoint names in ``.metadata``, beside dtypes and torch.Size."""
