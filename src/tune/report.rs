//! The run as a picture: the loss in training, the loss and the metric on held-out examples.

use plotters::{
    coord::types::RangedCoordf64,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{
    plan::{HeldOut, Plan},
    trainer::State,
};

const SIZE: (u32, u32) = (900, 520);
const TRAIN: RGBColor = RGBColor(150, 160, 175);
const HELD_OUT: RGBColor = RGBColor(20, 90, 200);
const METRIC: RGBColor = RGBColor(200, 90, 20);
const GRID: RGBColor = RGBColor(228, 230, 235);
const FONT: &str = "sans-serif";

/// Draws a run as SVG. The error says what plotters could not do.
pub fn curve(plan: &Plan, state: &State) -> Result<String, String> {
    let mut svg = String::new();
    draw(&mut svg, plan, state).map_err(|e| e.to_string())?;
    Ok(svg)
}

fn draw(svg: &mut String, plan: &Plan, state: &State) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let steps = state.step.max(1) as f64;
    let train = smooth(&state.losses);
    let held_out: Vec<(f64, f64)> =
        state.evaluations.iter().map(|(step, validation)| (*step as f64, validation.loss)).collect();
    let exact: Vec<(f64, f64)> =
        state.evaluations.iter().map(|(step, validation)| (*step as f64, validation.exact)).collect();
    let highest = train.iter().chain(&held_out).map(|p| p.1).filter(|y| y.is_finite()).fold(0.0, f64::max);
    let top = if highest > 0.0 { highest * 1.08 } else { 1.0 };

    let mut chart = ChartBuilder::on(&root)
        .caption(
            format!(
                "{}: {} virtual tokens, {}",
                plan.task,
                plan.parameters.virtual_tokens(),
                plan.parameters.method().title()
            ),
            (FONT, 20),
        )
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .right_y_label_area_size(60)
        .build_cartesian_2d(0.0..steps, 0.0..top)?
        .set_secondary_coord(0.0..steps, 0.0..1.05);
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(BLACK)
        .x_desc("step")
        .y_desc("loss (nats a token)")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.1}"))
        .label_style((FONT, 14))
        .axis_desc_style((FONT, 15))
        .draw()?;
    let metric = plan.metric().replace('_', " ");
    chart
        .configure_secondary_axes()
        .y_desc(metric.as_str())
        .y_label_formatter(&|y| format!("{:.0}%", 100.0 * y))
        .y_labels(6)
        .label_style((FONT, 14))
        .axis_desc_style((FONT, 15))
        .draw()?;
    let held_name = match plan.held_out_is {
        HeldOut::Training if plan.folds > 0 => "cross-validation",
        HeldOut::Training => "training examples",
        HeldOut::File | HeldOut::Split => "held-out",
    };
    let finite = |points: Vec<(f64, f64)>| points.into_iter().filter(|p| p.1.is_finite());
    let line = |color: RGBColor, width| ShapeStyle { color: color.into(), filled: true, stroke_width: width };
    let sample = |style: ShapeStyle| move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style);
    let style = line(TRAIN, 2);
    chart.draw_series(LineSeries::new(finite(train), style))?.label("loss, training batches").legend(sample(style));
    let style = line(HELD_OUT, 2);
    chart
        .draw_series(LineSeries::new(finite(held_out.clone()), style).point_size(3))?
        .label(format!("loss, {held_name}"))
        .legend(sample(style));
    let style = line(METRIC, 2);
    chart
        .draw_secondary_series(LineSeries::new(finite(exact), style).point_size(3))?
        .label(format!("{metric}, {held_name} (right)"))
        .legend(sample(style));
    if let Some(best) = &state.best {
        mark(&mut chart, best.step as f64, top)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::MiddleRight)
        .background_style(WHITE.mix(0.85))
        .border_style(GRID)
        .label_font((FONT, 14))
        .draw()?;
    root.present()?;
    Ok(())
}

type Chart<'a, 'b> = plotters::chart::DualCoordChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<RangedCoordf64, RangedCoordf64>,
    Cartesian2d<RangedCoordf64, RangedCoordf64>,
>;

/// A dashed line at the step whose prompt was kept.
fn mark(chart: &mut Chart<'_, '_>, step: f64, top: f64) -> Result<(), Box<dyn std::error::Error>> {
    let dashes = (0..40).step_by(2).map(|i| {
        let y = |i: i32| top * f64::from(i) / 40.0;
        PathElement::new([(step, y(i)), (step, y(i + 1))], BLACK.mix(0.5))
    });
    chart.draw_series(dashes)?;
    let grey = BLACK.mix(0.6);
    let style = TextStyle::from((FONT, 13)).color(&grey).pos(Pos::new(HPos::Right, VPos::Bottom));
    chart.draw_series([Text::new(format!("kept: step {step:.0} "), (step, top * 0.2), style)])?;
    Ok(())
}

/// A running mean over about a fiftieth of the run: single batches are noise.
fn smooth(losses: &[f64]) -> Vec<(f64, f64)> {
    let width = (losses.len() / 50).max(1);
    losses
        .iter()
        .enumerate()
        .map(|(i, _)| {
            let window = &losses[(i + 1).saturating_sub(width)..=i];
            ((i + 1) as f64, window.iter().sum::<f64>() / window.len() as f64)
        })
        .collect()
}
