//! Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), with the paper's constants: AdamW without
//! decay.

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.999;
const EPSILON: f32 = 1e-8;

/// The running moments of a gradient.
pub(super) struct Adam {
    first: Vec<f32>,
    second: Vec<f32>,
    steps: i32,
}

impl Adam {
    pub(super) fn new(num_values: usize) -> Self {
        Self { first: vec![0.0; num_values], second: vec![0.0; num_values], steps: 0 }
    }

    pub(super) fn step(&mut self, values: &mut [f32], gradient: &[f32], learning_rate: f32) {
        self.steps += 1;
        let first_share = 1.0 - BETA1.powi(self.steps);
        let second_share = 1.0 - BETA2.powi(self.steps);
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((value, &g), (first, second)) in values.iter_mut().zip(gradient).zip(moments) {
            *first = BETA1 * *first + (1.0 - BETA1) * g;
            *second = BETA2 * *second + (1.0 - BETA2) * g * g;
            let direction = *first / first_share / ((*second / second_share).sqrt() + EPSILON);
            *value -= learning_rate * direction;
        }
    }
}
