//! Our CUDA kernels as functions of a device, and how they are launched.

use std::sync::Arc;

use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Error, Result, Storage, Tensor,
    backend::BackendDevice as _,
    bail,
    cuda::{CudaDType, WrapErr as _},
    op::BackpropOp,
};
use cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchArgs, LaunchConfig, PushKernelArg as _,
    sys::{CUdevice_attribute, CUfunction_attribute},
};

/// The kernels of `cu/all.cu` for compute capability 8.0, which the driver compiles for the device at hand.
const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/all.ptx"));

macro_rules! kernels {
    ($($name:ident),* $(,)?) => {
        /// Every kernel that is launched by name.
        #[derive(Debug)]
        pub struct Functions { $(pub $name: CudaFunction,)* }

        impl Functions {
            fn load(module: &Arc<cudarc::driver::CudaModule>) -> Result<Self> {
                Ok(Self { $($name: module.load_function(stringify!($name)).w()?,)* })
            }
        }
    };
}

kernels! {
    rms_norm, layer_norm, add_rms_norm, add_layer_norm, pick_rows, rope, gate_up_bf16, gate_up_f32, activate_rows, add_bias, round_to_bf16, embed_bf16, embed_f32,
    rotate_and_write_bf16, rotate_and_write_f32, norm_rotate_and_write_bf16, norm_rotate_and_write_f32, copy_slots_bf16, copy_slots_f32, join_splits_bf16, join_splits_f32,
    attend_tiles_1, attend_tiles_2, attend_tiles_4, attend_tiles_5, attend_tiles_6, attend_tiles_8, attend_tiles_16,
    attend_rows_bf16_1_1, attend_rows_bf16_2_1, attend_rows_bf16_4_1, attend_rows_bf16_1_4, attend_rows_bf16_2_4,
    attend_rows_bf16_4_4, attend_rows_f32_1_1, attend_rows_f32_2_1, attend_rows_f32_4_1, attend_rows_f32_1_4,
    attend_rows_f32_2_4, attend_rows_f32_4_4, multiply_1, multiply_2, multiply_3, multiply_4, multiply_gated_1,
    multiply_gated_2, multiply_gated_3, multiply_gated_4, choose_largest, pick_log_probabilities, attend_vectors_64_1, attend_vectors_64_4, attend_vectors_128_1, attend_vectors_128_4,
    attend_vectors_256_1, attend_vectors_256_4,
}

/// A device with our kernels loaded, and the one stream that all work is put on.
#[derive(Debug)]
pub struct Cuda {
    pub device: CudaDevice,
    pub stream: Arc<CudaStream>,
    pub functions: Functions,
    /// The most bytes of shared memory that a block may ask for.
    pub shared_bytes: usize,
}

impl Cuda {
    /// Loads the kernels.
    ///
    /// # Errors
    /// The device is no CUDA device, or the driver is too old for the kernels.
    pub fn new(device: &Device) -> Result<Self> {
        let Device::Cuda(device) = device else { bail!("the CUDA backend does not run on {:?}", device.location()) };
        let (device, stream) = (device.clone(), device.cuda_stream());
        let context = stream.context();
        let (major, minor) = context.compute_capability().w()?;
        if major < 8 {
            bail!(
                "the GPU has compute capability {major}.{minor} and the kernels need 8.0 or newer (an A100, an RTX 30 or \
                 what came after); use --device cpu"
            );
        }
        // SAFETY: events order the work of several streams, and there is one: everything here, candle's own operations
        // included, is put on the stream of this device.
        unsafe { device.disable_event_tracking() };
        keep_freed_memory(context)?;
        let module = context.load_module(PTX.into()).map_err(|error| {
            Error::Msg(format!(
                "the driver does not load the CUDA kernels ({error}); it has to be of the CUDA version that the program \
                 was built with, or newer: see nvidia-smi"
            ))
        })?;
        let functions = Functions::load(&module)?;
        let shared =
            context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN).w()?;
        let f = &functions;
        for function in [
            &f.attend_tiles_1,
            &f.attend_tiles_2,
            &f.attend_tiles_4,
            &f.attend_tiles_5,
            &f.attend_tiles_6,
            &f.attend_tiles_8,
            &f.attend_tiles_16,
        ] {
            function
                .set_attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
                .w()?;
        }
        Ok(Self { device, stream, functions, shared_bytes: shared as usize })
    }

    /// Memory for a result that a kernel writes all of.
    pub fn uninitialised<T: DeviceRepr>(&self, count: usize) -> Result<CudaSlice<T>> {
        // SAFETY: whoever asks launches a kernel that writes every value, on the same stream, before any that reads.
        unsafe { self.device.alloc(count.max(1)) }
    }

    /// A tensor of what a kernel wrote.
    pub fn tensor<T: CudaDType>(&self, values: CudaSlice<T>, shape: impl Into<candle_core::Shape>) -> Tensor {
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(values, self.device.clone()));
        Tensor::from_storage(storage, shape, BackpropOp::none(), false)
    }

    /// The address of a tensor's first value. The tensor has to outlive the launch that reads it: what is freed after a
    /// launch is freed in the order of the stream.
    ///
    /// # Errors
    /// The tensor is of another type, on another device, or its values do not lie in order.
    pub fn address<T: CudaDType + DeviceRepr>(&self, x: &Tensor) -> Result<u64> {
        if !x.is_contiguous() {
            bail!("a kernel was given values that do not lie in order: {:?}", x.layout());
        }
        let (storage, layout) = x.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) if storage.device.same_device(&self.device) => {
                let values = storage.as_cuda_slice::<T>()?;
                Ok(self.address_of(values) + (layout.start_offset() * size_of::<T>()) as u64)
            }
            _ => bail!("a tensor on {:?} was given to a kernel of {:?}", x.device().location(), self.device.location()),
        }
    }

    /// The address of a tensor `[t, …]` whose rows lie in order each, and how many values after another they begin.
    ///
    /// # Errors
    /// As [`address`](Self::address).
    pub fn rows_of<T: CudaDType + DeviceRepr>(&self, x: &Tensor) -> Result<(u64, usize)> {
        let row = x.narrow(0, 0, 1.min(x.dims()[0]))?;
        let stride = x.stride()[0];
        Ok((self.address::<T>(&row)?, stride))
    }

    /// As [`address`](Self::address), null where there is no tensor.
    ///
    /// # Errors
    /// As there.
    pub fn address_or_null<T: CudaDType + DeviceRepr>(&self, x: Option<&Tensor>) -> Result<u64> {
        x.map_or(Ok(0), |x| self.address::<T>(x))
    }

    /// The address of memory on the device.
    pub fn address_of<T>(&self, values: &CudaSlice<T>) -> u64 {
        values.device_ptr(&self.stream).0
    }

    /// Begins a launch.
    pub fn launch<'a>(&'a self, function: &'a CudaFunction) -> Launch<'a> {
        Launch(self.stream.launch_builder(function))
    }
}

/// Keeps memory that tensors give back for the next ones: by default it goes to the system at every synchronisation.
fn keep_freed_memory(context: &cudarc::driver::CudaContext) -> Result<()> {
    use cudarc::driver::sys;
    let mut pool = std::ptr::null_mut();
    let mut threshold = u64::MAX;
    // SAFETY: the context lives, so its device is valid, and the attribute is a u64 that outlives the call.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&raw mut pool, context.cu_device()).result().w()?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast()).result().w()
    }
}

/// A launch whose arguments are being collected, in the order of the kernel's parameters.
pub struct Launch<'a>(LaunchArgs<'a>);

impl<'a> Launch<'a> {
    /// The next argument: a number, or an address.
    pub fn arg<T: DeviceRepr>(mut self, value: &'a T) -> Self {
        self.0.arg(value);
        self
    }

    /// Puts the kernel on the stream; nothing for an empty grid.
    ///
    /// # Safety
    /// The arguments are those of the kernel's parameters, its addresses are valid for what the kernel reads and writes
    /// with this grid, and no other launch reads or writes there at the same time on another stream.
    ///
    /// # Errors
    /// The driver refuses the launch.
    pub unsafe fn run(mut self, grid: [usize; 3], threads: usize, shared_bytes: usize) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let grid_dim = (grid[0] as u32, grid[1] as u32, grid[2] as u32);
        let config =
            LaunchConfig { grid_dim, block_dim: (threads as u32, 1, 1), shared_mem_bytes: shared_bytes as u32 };
        // SAFETY: as the caller says.
        unsafe { self.0.launch(config) }.w()?;
        Ok(())
    }
}

/// Threads of a block that has one row of `width` values: whole warps, with four values each where there are as many.
pub fn threads_for(width: usize) -> usize {
    width.div_ceil(4).next_multiple_of(32).clamp(32, 1024)
}

/// Blocks of [`ELEMENT_THREADS`] threads for one thread an element.
pub fn element_grid(count: usize) -> [usize; 3] {
    [count.div_ceil(ELEMENT_THREADS), 1, 1]
}

pub const ELEMENT_THREADS: usize = 256;

/// A tensor in f32, in order.
///
/// # Errors
/// There is no memory.
pub fn plain(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(DType::F32)?.contiguous()
}
