//! One captured graph serves for ever: replays with other inputs give what an eager call gives, and
//! no call keeps memory.

use moefy::cuda::{
    Buffer, DeviceRouter, Format, RouterSelectOutputs, SelectOutputs, View, Workspace, route_index,
    router_select, router_select_workspace_bytes,
};
use moefy::ffn::Selection;
use moefy::{DType, Tensor};

use crate::harness::{Gpu, Output, is_small, uniform};
use crate::route_index::Lists;
use crate::router_select::routers;

pub fn tests() -> crate::Tests {
    vec![
        ("steady::replays_with_other_inputs", replays_with_other_inputs),
        ("steady::memory_stays_flat", memory_stays_flat),
    ]
}

const TOKENS: usize = 19;
const EXPERTS: usize = 112;
const D_MODEL: usize = 384;

/// From tokens to lists, on buffers that stay where they are.
struct Pipeline {
    x: Output,
    mask: Output,
    lists: Lists,
    router: DeviceRouter,
    workspace: Buffer,
}

impl Pipeline {
    fn new(gpu: &Gpu) -> Self {
        let router = &routers(&mut gpu.rng(), [EXPERTS, D_MODEL, 128], DType::BF16)[1];
        let router = DeviceRouter::new(&gpu.device, router, DType::BF16).unwrap();
        let bytes = router_select_workspace_bytes(TOKENS, &router.view());
        Self {
            x: Output::new(gpu, TOKENS * D_MODEL * 2),
            mask: Output::words(gpu, TOKENS * EXPERTS.div_ceil(32)),
            lists: Lists::new(gpu, TOKENS, EXPERTS, TOKENS * EXPERTS),
            router,
            workspace: Buffer::new(&gpu.device, bytes).unwrap(),
        }
    }

    fn launch(&self, gpu: &Gpu, stream: moefy::cuda::RawStream) -> moefy::Result<()> {
        let mask = View::matrix(self.mask.address(), Format::Word, [TOKENS, EXPERTS.div_ceil(32)]);
        let selected = SelectOutputs { mask, counts: None, status: None };
        let outputs = RouterSelectOutputs { selected, scores: None };
        let x = View::matrix(self.x.address(), Format::Float(DType::BF16), [TOKENS, D_MODEL]);
        let (device, selection) = (&gpu.device, Selection::dynamic_k(0.5));
        let (router, none) = (self.router.view(), Workspace::NONE);
        let workspace =
            Workspace { address: self.workspace.address(), bytes: self.workspace.bytes() };
        unsafe {
            router_select(device, stream, &outputs, x, None, &router, &selection, workspace)?;
            route_index(device, stream, &self.lists.views(None), mask, EXPERTS, None, none)
        }
    }

    fn poison(&mut self) {
        self.mask.poison();
        self.lists.token_ids.poison();
        self.lists.counts.poison();
    }

    fn read(&self) -> [Vec<u32>; 3] {
        [self.mask.read(), self.lists.token_ids.read(), self.lists.counts.read()]
    }
}

fn replays_with_other_inputs(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let mut pipeline = Pipeline::new(gpu);
    let graph = gpu.capture(|stream| pipeline.launch(gpu, stream)).expect("kernels");
    let mut masks = std::collections::HashSet::new();
    for _ in 0..if is_small() { 3 } else { 1000 } {
        let x = Tensor::vector(uniform(rng, TOKENS * D_MODEL)).to_dtype(DType::BF16);
        pipeline.x.write(x.as_bytes());
        pipeline.poison();
        graph.launch().unwrap();
        let replayed = pipeline.read();
        pipeline.poison();
        pipeline.launch(gpu, gpu.raw_stream()).unwrap();
        assert!(pipeline.read() == replayed, "a replay differs from an eager call");
        masks.insert(replayed[0].clone());
    }
    assert!(masks.len() > 2, "the routing never changed");
}

fn memory_stays_flat(gpu: &Gpu) {
    let mut pipeline = Pipeline::new(gpu);
    pipeline.x.write(&vec![0x3cu8; TOKENS * D_MODEL * 2]);
    let context = gpu.device.cudarc_context();
    let call = || pipeline.launch(gpu, gpu.raw_stream()).unwrap();
    call();
    context.synchronize().unwrap();
    let (before, _) = context.mem_get_info().unwrap();
    (0..if is_small() { 10 } else { 10_000 }).for_each(|_| call());
    context.synchronize().unwrap();
    let (after, _) = context.mem_get_info().unwrap();
    assert_eq!(before, after, "free memory before and after");
}
